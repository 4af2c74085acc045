"""What a load generator saw: calls and runs. Instants count from the start of the load."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True, slots=True, kw_only=True)
class CallRecord:
    """One call as its client saw it."""

    run_id: str
    call_id: str
    stage: str
    planned_s: float
    """When it was due: its run's arrival, or the end of the calls before it and the gap."""
    sent_s: float
    """When it was handed to the HTTP client."""
    first_token_s: float | None = None
    end_s: float
    token_times_s: Sequence[float] = ()
    """Arrivals of the events that brought tokens."""
    num_prompt_tokens: int | None = None
    """As the server counted them; None if it did not say. So are the other two."""
    num_output_tokens: int | None = None
    num_cached_tokens: int | None = None
    instance: str = ""
    """`X-Workflow-Instance` of the response; empty if the server does not say."""
    status: int | None = None
    """HTTP status; None if there was no response."""
    error: str = ""
    """What went wrong; empty if nothing did."""
    has_trace_lengths: bool = True
    """Whether prompt and answer had as many tokens as in the trace, as far as the server says."""

    @property
    def late_s(self) -> float:
        """How much later than planned it was sent: the generator's fault."""
        return max(0.0, self.sent_s - self.planned_s)

    @property
    def ttft_s(self) -> float | None:
        """Time to first token, from sending."""
        return None if self.first_token_s is None else self.first_token_s - self.sent_s

    @property
    def e2el_s(self) -> float:
        return self.end_s - self.sent_s

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first; None for fewer than two."""
        if self.first_token_s is None or not self.num_output_tokens or self.num_output_tokens < 2:
            return None
        return (self.end_s - self.first_token_s) / (self.num_output_tokens - 1)

    @property
    def itls_s(self) -> list[float]:
        """Times between the events that brought tokens."""
        return [after - before for before, after in pairwise(self.token_times_s)]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """One run as whoever waits for it saw it."""

    run_id: str
    workflow: str
    tenant: str = ""
    arrival_s: float
    """When it was due; with a limit on concurrent runs, when it got its place if that is later."""
    end_s: float
    """Of its last call, whether that failed or not."""
    slo_s: float | None = None
    reference_s: float | None = None
    """Duration that SLO scales are multiples of."""
    num_calls: int
    """In the trace; a run with a failed call makes fewer."""
    calls: tuple[CallRecord, ...] = ()
    """Those made, in the order of their ends."""

    @property
    def finished(self) -> bool:
        """Whether all of its calls were made and answered."""
        return len(self.calls) == self.num_calls and not any(c.error for c in self.calls)

    @property
    def latency_s(self) -> float:
        """End to end; `inf` for a failed run, which misses every SLO."""
        return self.end_s - self.arrival_s if self.finished else math.inf

    @property
    def met_slo(self) -> bool | None:
        return None if self.slo_s is None else self.latency_s <= self.slo_s
