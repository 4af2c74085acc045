"""Which tenant's run begins next, when not all can be on time.

Each tenant's runs wait in a queue of their own, by the rule of `core.admission`. The tenant with
fewest runs under way, per weight, is asked first, and for the slowdown with one run more the runs
of the others count only as far as they would be level with its own then. So a tenant that is
within its share begins its runs as if nobody had more than that, and whoever has more waits until
all together are few enough: where not all runs can be on time, those of a tenant that floods the
fleet are the ones that wait, are relegated, or are refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from heapq import heapify, heappop
from itertools import count

from vllm_workflow.core.admission import Admission, Demand, Held
from vllm_workflow.core.admissions import Admissions
from vllm_workflow.core.config import PolicyConfig
from vllm_workflow.core.pace import Pace
from vllm_workflow.core.types import StageRequest

_MIN_HOLD_S = 1e-3
"""Nobody looks again sooner than this whether a quota has room."""

Weight = Callable[[str], float]
"""Of a tenant."""
ReadyTime = Callable[[StageRequest, float], float]
"""Instant from which a run may begin as far as its tenant's quotas go, given now."""


class TenantAdmissions(Admissions):
    """As `Admissions`, keeping tenants apart.

    Args:
        paces: As there.
        config: As there.
        demands: As there.
        weight: Tenants' shares.
        ready_time: Asked before a run begins.
    """

    def __init__(
        self,
        paces: dict[str, Pace],
        config: PolicyConfig,
        demands: dict[str, Demand],
        weight: Weight,
        ready_time: ReadyTime,
    ) -> None:
        super().__init__(paces, config, demands)
        self._weight = weight
        self._ready_time = ready_time

    def _made(self, pace: Pace, demand: Demand) -> Admission:
        return TenantAdmission(
            pace, self._config, demand=demand, weight=self._weight, ready_time=self._ready_time
        )

    @property
    def next_expiry(self) -> float:
        time = super().next_expiry
        for admission in self.holding.values():
            assert isinstance(admission, TenantAdmission)
            time = min(time, admission.ready_at)
        return time


class TenantAdmission(Admission):
    """The runs of one model that wait to begin, by tenant.

    Args:
        pace: Of the runs under way.
        config: The policy.
        demand: What runs are promised and need.
        weight: Tenants' shares.
        ready_time: Asked before a run begins.
    """

    def __init__(
        self,
        pace: Pace,
        config: PolicyConfig,
        *,
        demand: Demand,
        weight: Weight,
        ready_time: ReadyTime,
    ) -> None:
        super().__init__(pace, config, demand=demand)
        self.ready_at = math.inf
        """Instant from which a quota has room for a run that it holds."""
        self._config = config
        self._weight = weight
        self._ready_time = ready_time
        self._queues: dict[str, _Queue] = {}
        """By tenant, of those that have runs waiting."""
        self._tenant_of: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self._tenant_of)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._tenant_of

    @property
    def num_waiting_runs(self) -> int:
        return sum(queue.num_waiting_runs for queue in self._queues.values())

    def is_first(self, request_id: str) -> bool:
        tenant_id = self._tenant_of.get(request_id)
        return tenant_id is not None and self._queues[tenant_id].is_first(request_id)

    def calls(self) -> list[Held]:
        held = [h for queue in self._queues.values() for h in queue.calls()]
        return sorted(held, key=lambda h: h.request.arrival_time)

    def hold(self, held: Held) -> None:
        tenant_id = held.request.tenant_id
        queue = self._queues.get(tenant_id)
        if queue is None:
            queue = self._queues[tenant_id] = _Queue(
                tenant_id, self.pace, self._config, self._demand, self._weight
            )
        queue.hold(held)
        self._tenant_of[held.request.request_id] = tenant_id

    def leave(self, request_id: str) -> Held | None:
        tenant_id = self._tenant_of.pop(request_id, None)
        if tenant_id is None:
            return None
        held = self._queues[tenant_id].leave(request_id)
        if not len(self._queues[tenant_id]):
            del self._queues[tenant_id]
        return held

    def beginning(self, now: float, *, is_idle: bool) -> list[Held]:
        """As in `Admission`; of the tenants that may begin one, that which has fewest."""
        self.ready_at = math.inf
        self.pace.tick(now)
        numbers = count()
        turns = [(q.level, q.first.arrival_time, next(numbers), q) for q in self._queues.values()]
        heapify(turns)
        while turns:
            queue = heappop(turns)[-1]
            time = self._ready_time(queue.first, now)
            if time > now:
                self.ready_at = min(self.ready_at, max(time, now + _MIN_HOLD_S))
                continue
            num_relegated = queue.num_relegated
            begun = queue.beginning(now, is_idle=is_idle)
            if begun:
                self.num_relegated += queue.num_relegated - num_relegated
                for held in begun:
                    del self._tenant_of[held.request.request_id]
                if not len(queue):
                    del self._queues[queue.tenant_id]
                return begun
            if queue.is_full(now):
                break  # for those that have more under way it is no better
        return []

    def wait_s(self, request: StageRequest) -> float:
        """As in `Admission`, where each tenant's runs begin as often as its share says."""
        tenant_id, num_runs = request.tenant_id, self.pace.num_runs
        if num_runs == 0:
            return 0.0
        weight = self._weight(tenant_id)
        everyone = dict.fromkeys([tenant_id, *self._queues, *self.pace.num_runs_of])
        share = num_runs * weight / sum(map(self._weight, everyone))
        queue = self._queues.get(tenant_id)
        num_own = self.pace.num_runs_of.get(tenant_id, 0)
        num_own += queue.num_waiting_runs if queue else 0
        return max(0.0, num_own - share) * self._run_s() / share


class _Queue(Admission):
    """The runs of one tenant that wait to begin."""

    def __init__(
        self, tenant_id: str, pace: Pace, config: PolicyConfig, demand: Demand, weight: Weight
    ) -> None:
        super().__init__(pace, config, demand=demand)
        self.tenant_id = tenant_id
        self._weight = weight

    @property
    def level(self) -> float:
        """Runs under way with one more, per weight."""
        num_runs = self.pace.num_runs_of.get(self.tenant_id, 0)
        return (num_runs + 1) / self._weight(self.tenant_id)

    @property
    def first(self) -> StageRequest:
        """The first call of the run that has waited longest, among those that go first."""
        runs = self._held[min(self._held)]
        return next(iter(runs.values()))[0].request

    def is_full(self, now: float) -> bool:
        """Whether one more would slow down runs by more than they can bear."""
        return self._slowdown_with_one_more(now) > self._demand.bearable

    def _num_with_one_more(self) -> float:
        level, weight = self.level, self._weight
        num_runs = 1.0
        for tenant_id, number in self.pace.num_runs_of.items():
            own = tenant_id == self.tenant_id
            num_runs += number if own else min(number, level * weight(tenant_id))
        return num_runs
