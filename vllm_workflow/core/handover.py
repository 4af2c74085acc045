"""What a router tells an engine of a call: durations, since their clocks need not agree."""

from __future__ import annotations

import math
from typing import Final, final

from vllm_workflow.core.types import StageRequest
from vllm_workflow.core.value import Value

_INF: Final = math.inf

_HANDOVER_FIELDS = (
    "budget_ms",
    "rest_ms",
    "service_ms",
    "age_ms",
    "attained_ms",
    "attained_path_ms",
)
XARGS: Final = tuple([f"wf_{name}" for name in _HANDOVER_FIELDS])
"""Their names as members of `vllm_xargs`."""


@final
class Handover(Value):
    """The numbers that travel with a call, in whole milliseconds; None is not sent."""

    __slots__ = _HANDOVER_FIELDS
    _fields = _HANDOVER_FIELDS

    budget_ms: Final[int | None]
    """What is left of the run's budget, 0 if that is nothing; None without a deadline."""
    rest_ms: Final[int]
    """Predicted work of the run after this call."""
    service_ms: Final[int]
    """Predicted duration of this call on the chosen instance."""
    age_ms: Final[int | None]
    """Since the run's first call; None if that is unknown."""
    attained_ms: Final[int | None]
    """Service that the run's finished calls have had, summed; None if there was none."""
    attained_path_ms: Final[int | None]
    """The same along the longest path of calls."""

    def __init__(
        self,
        budget_ms: int | None,
        rest_ms: int,
        service_ms: int,
        age_ms: int | None,
        attained_ms: int | None,
        attained_path_ms: int | None,
    ) -> None:
        self.budget_ms = budget_ms
        self.rest_ms = rest_ms
        self.service_ms = service_ms
        self.age_ms = age_ms
        self.attained_ms = attained_ms
        self.attained_path_ms = attained_path_ms

    def xargs(self) -> dict[str, int]:
        """As members of `vllm_xargs`."""
        said = {"wf_rest_ms": self.rest_ms, "wf_service_ms": self.service_ms}
        if self.budget_ms is not None:
            said["wf_budget_ms"] = self.budget_ms
        if self.age_ms is not None:
            said["wf_age_ms"] = self.age_ms
        if self.attained_ms is not None:
            said["wf_attained_ms"] = self.attained_ms
        if self.attained_path_ms is not None:
            said["wf_attained_path_ms"] = self.attained_path_ms
        return said


def handover(request: StageRequest, *, service_s: float, now: float) -> Handover:
    """Return what goes out with a call.

    Args:
        request: The call.
        service_s: Predicted duration of it on the chosen instance.
        now: Instant of sending, on the clock of `request`.
    """
    budget_ms = age_ms = attained_ms = attained_path_ms = None
    if -_INF < request.deadline < _INF:
        budget_ms = max(0, round(1000.0 * (request.deadline - now)))
    if -_INF < request.run_arrival_time < _INF:
        age_ms = max(0, round(1000.0 * (now - request.run_arrival_time)))
    if request.attained_s > 0.0:
        attained_ms = round(1000.0 * request.attained_s)
        attained_path_ms = round(1000.0 * request.attained_path_s)
    return Handover(
        budget_ms,
        round(1000.0 * request.rest_s),
        round(1000.0 * service_s),
        age_ms,
        attained_ms,
        attained_path_ms,
    )
