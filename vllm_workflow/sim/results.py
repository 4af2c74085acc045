"""What a simulation came to: one value per run and per call."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, final

from vllm_workflow.core.value import Value

_CALL_RESULT_FIELDS = (
    "run_id",
    "call_id",
    "stage",
    "instance_id",
    "num_prompt_tokens",
    "num_output_tokens",
    "submit_time",
    "sent_time",
    "first_token_time",
    "end_time",
    "num_cached_tokens",
    "num_preemptions",
    "num_attempts",
)


@final
class CallResult(Value):
    """What became of one call; instants, `nan` for what did not happen."""

    __slots__ = _CALL_RESULT_FIELDS
    _fields = _CALL_RESULT_FIELDS

    run_id: Final[str]
    call_id: Final[str]
    stage: Final[str]
    instance_id: Final[str]
    """Of the last attempt."""
    num_prompt_tokens: Final[int]
    num_output_tokens: Final[int]
    submit_time: Final[float]
    """When the client made it."""
    sent_time: Final[float]
    """When the router forwarded it, the last time it did."""
    first_token_time: Final[float]
    end_time: Final[float]
    num_cached_tokens: Final[int]
    num_preemptions: Final[int]
    num_attempts: Final[int]

    def __init__(
        self,
        run_id: str,
        call_id: str,
        stage: str,
        instance_id: str,
        num_prompt_tokens: int,
        num_output_tokens: int,
        submit_time: float,
        sent_time: float = math.nan,
        first_token_time: float = math.nan,
        end_time: float = math.nan,
        num_cached_tokens: int = 0,
        num_preemptions: int = 0,
        num_attempts: int = 1,
    ) -> None:
        self.run_id = run_id
        self.call_id = call_id
        self.stage = stage
        self.instance_id = instance_id
        self.num_prompt_tokens = num_prompt_tokens
        self.num_output_tokens = num_output_tokens
        self.submit_time = submit_time
        self.sent_time = sent_time
        self.first_token_time = first_token_time
        self.end_time = end_time
        self.num_cached_tokens = num_cached_tokens
        self.num_preemptions = num_preemptions
        self.num_attempts = num_attempts


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """What became of one run."""

    run_id: str
    workflow: str
    tenant: str
    arrival_time: float
    end_time: float
    """`nan` if it did not end."""
    slo_s: float | None
    num_calls: int

    @property
    def finished(self) -> bool:
        return not math.isnan(self.end_time)

    @property
    def latency_s(self) -> float:
        """End to end; `inf` if it did not end."""
        return self.end_time - self.arrival_time if self.finished else math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class SimResult:
    """What a simulation came to."""

    runs: tuple[RunResult, ...]
    """All that arrived, in order of arrival."""
    calls: tuple[CallResult, ...]
    """All that were made, in that order."""
    end_time: float
    """Of the last thing that happened."""
    policy: str
    """Its fingerprint."""
    decision_us: tuple[float, ...] = ()
    """Real microseconds of each decision, if asked for; the only part that differs from one
    simulation to the next."""
