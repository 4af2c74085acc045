"""What a simulation came to: one value per run and per call."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple


class CallResult(NamedTuple):
    """What became of one call; instants, `nan` for what did not happen."""

    run_id: str
    call_id: str
    stage: str
    instance_id: str
    """Of the last attempt."""
    num_prompt_tokens: int
    num_output_tokens: int
    submit_time: float
    """When the client made it."""
    sent_time: float = math.nan
    """When the router forwarded it, the last time it did."""
    first_token_time: float = math.nan
    end_time: float = math.nan
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    num_attempts: int = 1


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
