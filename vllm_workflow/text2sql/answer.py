"""What one run of the Text-to-SQL workflow gives back."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_workflow.text2sql.types import Execution, SqlCandidate, ValueHit


@dataclass(frozen=True, slots=True, kw_only=True)
class StageCall:
    """One LLM call of the run, with the retries that the SDK made for it."""

    stage: str
    start_s: float
    """Seconds since the run began; likewise `end_s`."""
    end_s: float
    num_attempts: int = 1
    """HTTP requests sent; more than one if the SDK retried."""
    instance: str | None = None
    """The instance that answered, if the server says so."""
    slack_ms: float | None = None
    """The router's slack for the call when it was dispatched."""
    queue_ms: float | None = None
    """Time the call waited in the router."""
    num_prompt_tokens: int | None = None
    num_cached_tokens: int | None = None
    """Prompt tokens that the prefix cache held, if the server says so."""
    num_output_tokens: int | None = None
    error: str | None = None
    """Why the call failed; None if it was answered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Candidates whose execution gave the same answer."""

    members: tuple[int, ...]
    """Indices into `Answer.candidates`, ascending; the first one stands for the cluster."""
    num_passed: int | None = None
    """Unit tests passed; None if the cluster was not tested."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitTest:
    """One generated test and its verdicts."""

    text: str
    passed: tuple[bool | None, ...]
    """Shape (number of clusters,); None where the cluster was not tested."""
    by_machine: bool
    """Decided by parsing or executing SQL alone; no model was asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The chosen SQL, its result, and how the run came to it."""

    question: str
    sql: str
    execution: Execution
    workflow_id: str
    latency_s: float
    """From the start of the run to the choice."""
    slo_s: float | None
    hits: tuple[ValueHit, ...]
    """Database values that the question mentions."""
    candidates: tuple[SqlCandidate, ...]
    """In the order they were asked for, after correction; failed calls are left out."""
    clusters: tuple[Cluster, ...]
    tests: tuple[UnitTest, ...]
    calls: tuple[StageCall, ...]
    """The timeline, by start."""
    num_revise_rounds: int

    @property
    def num_calls(self) -> int:
        return len(self.calls)

    @property
    def deadline_met(self) -> bool | None:
        """Whether the run ended within its SLO; None without an SLO."""
        return None if self.slo_s is None else self.latency_s <= self.slo_s
