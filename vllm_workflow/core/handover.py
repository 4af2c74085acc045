"""What a router tells an engine of a call: durations, since their clocks need not agree."""

from __future__ import annotations

import math
from typing import NamedTuple

from vllm_workflow.core.types import Decision, StageRequest


class Handover(NamedTuple):
    """The numbers that travel with a call, in whole milliseconds."""

    budget_ms: int | None
    """What is left of the run's budget, 0 if that is nothing; None without a deadline."""
    rest_ms: int
    """Predicted work of the run after this call."""
    service_ms: int
    """Predicted duration of this call on the chosen instance."""


def handover(request: StageRequest, decision: Decision, *, now: float) -> Handover:
    """Return what goes out with `request` at `now`, an instant on its own clock."""
    budget_ms = None
    if math.isfinite(request.deadline):
        budget_ms = max(0, round(1000.0 * (request.deadline - now)))
    return Handover(
        budget_ms, round(1000.0 * request.rest_s), round(1000.0 * decision.chosen.service_s)
    )
