"""Ordering: which waiting request runs first.

The same objects order the router's queue and an engine's queue.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

from vllm_workflow.core.deadline import proportional_budget_s
from vllm_workflow.core.types import StageRequest

DEFAULT_PATIENCE_S = 60.0


class OrderingPolicy(Protocol):
    """Ranks the waiting requests of one queue."""

    def key(self, request: StageRequest) -> float:
        """Smaller runs first; an instant, or comparable with one. Never `nan`.

        Must not depend on the time it is called at. Slack shrinks by one second per second
        for every waiting request alike, so the order by slack is the order by latest start
        time, which is constant. A heap keyed on it never needs rebuilding.
        """
        ...


@dataclass(frozen=True, slots=True)
class Fcfs:
    """First come, first served, call by call: what vLLM does."""

    def key(self, request: StageRequest) -> float:
        return request.arrival_time


@dataclass(frozen=True, slots=True)
class _DeadlineOrder:
    """What the policies that rank by deadline share."""

    patience_s: float = DEFAULT_PATIENCE_S
    """A call without a deadline is ranked as if it had arrived with this budget: it waits
    for calls that are more urgent, but it ages, so none can starve it."""

    def deadline(self, request: StageRequest) -> float:
        if request.has_deadline:
            return request.deadline
        return request.arrival_time + self.patience_s


@dataclass(frozen=True, slots=True)
class EarliestDeadline(_DeadlineOrder):
    """Earliest deadline of the run first (EDF)."""

    def key(self, request: StageRequest) -> float:
        return self.deadline(request)


@dataclass(frozen=True, slots=True)
class LeastSlack(_DeadlineOrder):
    """Latest start time first, i.e. least slack: deadline − rest of the run − this call."""

    def key(self, request: StageRequest) -> float:
        return self.deadline(request) - request.rest_s - request.service_s


@dataclass(frozen=True, slots=True)
class Urgency(_DeadlineOrder):
    """The urgency queue of HexGen-Text2SQL (arXiv 2505.05286).

    The run's remaining budget is split in proportion to predicted work; this call's share
    is its own budget. Urgency is U = service − (budget − waited), largest first. `waited`
    grows alike for all, so the order is by arrival + budget − service, a constant.
    """

    def key(self, request: StageRequest) -> float:
        budget_s = proportional_budget_s(
            self.deadline(request) - request.arrival_time, request.service_s, request.rest_s
        )
        return request.arrival_time + budget_s - request.service_s


ORDERING_POLICIES: Mapping[str, Callable[[float], OrderingPolicy]] = MappingProxyType(
    {
        "fcfs": lambda patience_s: Fcfs(),
        "deadline": EarliestDeadline,
        "slack": LeastSlack,
        "urgency": Urgency,
    }
)
"""Every ordering policy by the name that `policy.json` uses; called with `patience_s`."""
