"""Ordering: which waiting request runs first.

The same objects order the router's queue and an engine's queue.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, Final, Protocol

from vllm_workflow.core.deadline import proportional_budget_s
from vllm_workflow.core.types import StageRequest

DEFAULT_PATIENCE_S: Final = 60.0
DEFAULT_STARVATION_RATIO: Final = 1.0


class OrderingPolicy(Protocol):
    """Ranks the waiting requests of one queue."""

    key_is_instant: ClassVar[bool]
    """Whether keys are instants, which another process must shift to its own clock; if not,
    they are durations. Keys of one policy are only ever compared with each other."""

    def key(self, request: StageRequest) -> float:
        """Smaller runs first; equal keys run in the order of arrival. Finite, never `nan`.

        Must not depend on the time it is called at. Slack shrinks by one second per second
        for every waiting request alike, so the order by slack is the order by latest start
        time, which is constant. A heap keyed on it never needs rebuilding.
        """
        ...


@dataclass(frozen=True, slots=True)
class Fcfs:
    """First come, first served, call by call: what vLLM does."""

    key_is_instant: ClassVar[bool] = True

    def key(self, request: StageRequest) -> float:
        return request.arrival_time


@dataclass(frozen=True, slots=True)
class _DeadlineOrder:
    """What the policies that rank by deadline share."""

    key_is_instant: ClassVar[bool] = True

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

        U = T − (b − waited),  b = R · T̄ / (T̄ + Σ T̄ of the stages still to come)

    R is what is left of the run's SLO when the call is made; the largest U runs first.
    `waited` grows alike for all calls, so the order is by arrival + b − T, a constant, where
    the published code computes every U anew in each step. It also differs in this:

    - T and T̄, constants per stage and GPU model there, are both the predicted service of
      this call; the stages to come are those of the workflow's profile, not of one standard
      workflow that every query is taken for.
    - R < 0, a run that is late already: there the split goes on, so of the runs that cannot be
      on time the longest calls go first. Here R is not split, so the latest run goes first.
      For 0 < R < T̄ + Σ T̄, where a miss is only predicted, long calls go first as published.
    - A call without a deadline, unknown there, has `patience_s`.
    """

    def key(self, request: StageRequest) -> float:
        budget_s = proportional_budget_s(
            self.deadline(request) - request.arrival_time, request.service_s, request.rest_s
        )
        return request.arrival_time + budget_s - request.service_s


@dataclass(frozen=True, slots=True)
class ProgramFcfs:
    """The run that came first goes first: program-level FCFS of Continuum (arXiv 2511.02230).

    None starves: only runs that came earlier go first, and of those there are ever fewer. With
    one SLO for all runs it is the order by deadline. Continuum also pins the KV blocks of runs
    that wait for a tool, which is not an order and not done here. A call of unknown run
    counts as a run of its own, which begins with it.
    """

    key_is_instant: ClassVar[bool] = True

    def key(self, request: StageRequest) -> float:
        if math.isnan(request.run_arrival_time):
            return request.arrival_time
        return request.run_arrival_time


@dataclass(frozen=True, slots=True)
class LeastAttained:
    """The run that has had least service goes first: PLAS of Autellix (arXiv 2502.13965).

    Attained service is that of the run's calls that have ended; no length is predicted. The
    paper sorts it into levels, first come first served within one, and moves a call to the
    first level once waiting over service exceeds a threshold, so that none starves. Here the
    same is one constant number, arrival + `starvation_ratio` · attained: a call that has
    waited `starvation_ratio` times what its run has attained goes before all that come from
    then on, and calls whose runs have attained about as much go by arrival. Autellix also
    takes the seat of a running call; this order does not. A call of unknown run has attained
    nothing, as the first call of any run.
    """

    key_is_instant: ClassVar[bool] = True

    starvation_ratio: float = DEFAULT_STARVATION_RATIO
    """Seconds of waiting that make up for one second of attained service."""

    def key(self, request: StageRequest) -> float:
        return request.arrival_time + self.starvation_ratio * request.attained_s


@dataclass(frozen=True, slots=True)
class LeastAttainedPath:
    """As `LeastAttained`, along the critical path: ATLAS of Autellix (arXiv 2502.13965).

    Of calls that ran side by side only the longest counts, so a run that fans out is not put
    off for being parallel. Within a run, calls that continue its longest path do not go
    before its other ones: like the paper's process table, one number per run is kept.
    """

    key_is_instant: ClassVar[bool] = True

    starvation_ratio: float = DEFAULT_STARVATION_RATIO

    def key(self, request: StageRequest) -> float:
        return request.arrival_time + self.starvation_ratio * request.attained_path_s


@dataclass(frozen=True, slots=True)
class ShortestCall:
    """The call with the shortest predicted service goes first (SJF).

    As in the literature nothing ages: under lasting load long calls starve. A call of unknown
    service is ranked as if it took `patience_s`.
    """

    key_is_instant: ClassVar[bool] = False

    patience_s: float = DEFAULT_PATIENCE_S

    def key(self, request: StageRequest) -> float:
        return request.service_s if request.service_s > 0.0 else self.patience_s


@dataclass(frozen=True, slots=True)
class ShortestRemaining:
    """The run with the least predicted work left goes first, this call included (SRPT).

    Without preemption: a call that runs keeps its seat. Long runs starve under lasting load,
    and a run whose workflow is not declared counts as one that ends with this call. A call
    of which neither service nor rest is known is ranked as if it took `patience_s`.
    """

    key_is_instant: ClassVar[bool] = False

    patience_s: float = DEFAULT_PATIENCE_S

    def key(self, request: StageRequest) -> float:
        remaining_s = request.service_s + request.rest_s
        return remaining_s if remaining_s > 0.0 else self.patience_s


ORDERING_POLICIES: Mapping[str, Callable[[float, float], OrderingPolicy]] = MappingProxyType(
    {
        "atlas": lambda patience_s, ratio: LeastAttainedPath(ratio),
        "deadline": lambda patience_s, ratio: EarliestDeadline(patience_s),
        "fcfs": lambda patience_s, ratio: Fcfs(),
        "plas": lambda patience_s, ratio: LeastAttained(ratio),
        "program-fcfs": lambda patience_s, ratio: ProgramFcfs(),
        "shortest-remaining": lambda patience_s, ratio: ShortestRemaining(patience_s),
        "sjf": lambda patience_s, ratio: ShortestCall(patience_s),
        "slack": lambda patience_s, ratio: LeastSlack(patience_s),
        "urgency": lambda patience_s, ratio: Urgency(patience_s),
    }
)
"""Every ordering policy by the name that `policy.json` uses; made of `patience_s` and
`starvation_ratio`."""
