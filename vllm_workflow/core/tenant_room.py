"""Where the calls of several tenants wait: whose turn it is, and which of its calls goes first."""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Mapping
from heapq import heapify, heappop, heappush
from typing import Final

from vllm_workflow.core.admission import Demand
from vllm_workflow.core.admissions import Admissions
from vllm_workflow.core.backlog import Backlog, Kind, Waiting
from vllm_workflow.core.choice import Choice
from vllm_workflow.core.config import PolicyConfig
from vllm_workflow.core.dispatch import DispatchPolicy
from vllm_workflow.core.fleet import Fleet
from vllm_workflow.core.pace import Pace
from vllm_workflow.core.tenant_admission import TenantAdmissions
from vllm_workflow.core.tenant_ledger import GUEST_MARGIN, TenantLedger
from vllm_workflow.core.tenant_queue import At, TenantQueue, Turn, after
from vllm_workflow.core.types import Candidate, StageRequest
from vllm_workflow.core.waiting_room import WaitingRoom

_ADMITTED_GUEST_MARGIN: Final = -0.25
"""As `GUEST_MARGIN`, of guests that had to wait until their run could begin. Less than nothing:
instances run by slack, so it is not the most urgent call that one more slows down most."""
_MIN_HOLD_S: Final = 1e-3
"""Nobody looks again sooner than this whether a quota has room."""


class TenantWaitingRoom(WaitingRoom):
    """As `WaitingRoom`, keeping tenants to their shares and quotas.

    Without late binding, where instances queue calls themselves, only quotas hold calls here.

    Args:
        fleet: What they wait for.
        policy: Chooses among the instances that can start a call.
        config: Order of the calls, and whether runs are relegated.
        ledger: Of the tenants.
        paces: How runs of each model slow each other down.
        demands: What runs of each model are promised and need.
    """

    def __init__(
        self,
        fleet: Fleet,
        policy: DispatchPolicy,
        config: PolicyConfig,
        ledger: TenantLedger,
        paces: dict[str, Pace] | None = None,
        demands: dict[str, Demand] | None = None,
    ) -> None:
        self._ledger = ledger
        super().__init__(fleet, policy, config, paces, demands)
        self._turns = TenantBacklog(ledger), TenantBacklog(ledger)
        self.backlog, self.relegated = self._turns
        self._has_guests = True

    def starting(
        self,
        now: float,
        newest: Waiting | None = None,
        newest_candidates: tuple[Candidate, ...] = (),
    ) -> Iterator[Choice]:
        """As in `WaitingRoom`; a new call may change whose turn it is, so all are looked at."""
        for turns in self._turns:
            turns.now, turns.held_until = now, math.inf
        if not self._config.late_binding:
            yield from self._released(now)
        elif self._fleet.has_room():
            yield from super().starting(now)
        else:
            self._begin_held(now)
            for turns in self._turns:
                turns.find_held()
            self._looked_at_version = self._fleet.version

    @property
    def held_until(self) -> float:
        backlog, relegated = self._turns
        return min(backlog.held_until, relegated.held_until, self._admissions.next_expiry)

    def _admissions_for(self, config: PolicyConfig) -> Admissions:
        return TenantAdmissions(
            self.paces,
            config,
            self._demands,
            weight=lambda tenant_id: self._ledger.config_of(tenant_id).weight,
            ready_time=self._ready_time,
        )

    def _ready_time(self, request: StageRequest, now: float) -> float:
        """When a run may begin; with quotas, none does before those that have are through."""
        tenant_id = request.tenant_id
        if not self._ledger.config_of(tenant_id).has_quota:
            return now
        if any(turns.has_tenant(tenant_id) for turns in self._turns):
            return math.inf
        time, quota = self._ledger.account(tenant_id).ready_time(request, now)
        if time > now:
            self._ledger.hold(request, quota, now)
        return time

    def _released(self, now: float) -> Iterator[Choice]:
        for waiting in self._in_turn(()):
            candidates = self._fleet.candidates(waiting.request, now=now, exclude=waiting.exclude)
            if not candidates:
                continue
            costs = self._policy.costs(waiting.request, candidates)
            if self.backlog.remove(waiting.request.request_id) is None:
                self.relegated.remove(waiting.request.request_id)
            yield Choice(waiting, candidates, costs, min(range(len(costs)), key=costs.__getitem__))
        self._looked_at_version = self._fleet.version

    @property
    def _goes_first(self) -> Waiting | None:
        first = super()._goes_first
        return None if first is None else next(self.relegated.walk(()), None)

    def _is_guest(self, waiting: Waiting) -> bool:
        return self._ledger.is_guest(waiting.request.tenant_id)

    def _bears(self, waiting: Waiting, candidate: Candidate, now: float) -> bool:
        """Whether such a call may join others on an instance without making them late."""
        margin = self._margin(candidate.instance_id)
        return not candidate.num_outstanding or self._fleet.bears(candidate, margin=margin)

    def _margin(self, instance_id: str) -> float:
        """What others must have to spare: a stretch leaves out what prompts computed beside
        them cost, and under a flood there are many; how far off it is, drift tells.

        Where a flood's runs wait to begin there are few at a time, and what is left free is lost.
        """
        if self._relegates:
            return _ADMITTED_GUEST_MARGIN
        return (1.0 + GUEST_MARGIN) * max(1.0, self._fleet.drift(instance_id)) - 1.0


class TenantBacklog(Backlog):
    """As `Backlog`, walked in turn by tenant.

    Of the tenants that are no more than `lag` ahead of the waiting one that has had least, the
    call that the policy puts first goes first. So as long as tenants keep level, as those do
    that stay within their shares, calls go by their slack whoever they belong to; a tenant
    that runs ahead is held behind the others, and inside a tenant slack decides always. What
    the others leave it takes: a call waits for its tenant's turn only while another's waits.

    Args:
        ledger: Of the tenants.
    """

    def __init__(self, ledger: TenantLedger) -> None:
        super().__init__()
        self.now = -math.inf
        """Instant that quotas are looked at for; to be set before `walk`."""
        self.held_until = math.inf
        """Instant from which a quota has room for a call that was found held."""
        self._ledger = ledger
        self._queues: dict[str, TenantQueue] = {}
        self._with_quota: dict[str, TenantQueue] = {}

    def add(
        self,
        request: StageRequest,
        key: float,
        num_prompt_bytes: int = 0,
        exclude: tuple[str, ...] = (),
        *,
        level: int = 0,
    ) -> Waiting:
        waiting = super().add(request, key, num_prompt_bytes, exclude, level=level)
        queue = self._queues.get(request.tenant_id)
        if queue is None:
            config = self._ledger.config_of(request.tenant_id)
            queue = self._queues[request.tenant_id] = TenantQueue(config)
            if queue.has_quota:
                self._with_quota[request.tenant_id] = queue
        queue._insert(waiting)
        return waiting

    def remove(self, request_id: str) -> Waiting | None:
        waiting = super().remove(request_id)
        if waiting is not None:
            tenant_id = waiting.request.tenant_id
            self._queues[tenant_id].remove(request_id)
            if not len(self._queues[tenant_id]):
                del self._queues[tenant_id]
                self._with_quota.pop(tenant_id, None)
        return waiting

    def has_tenant(self, tenant_id: str) -> bool:
        """Whether a call of a tenant waits."""
        return tenant_id in self._queues

    def walk(self, passed_over: Container[Kind]) -> Iterator[Waiting]:
        """Yield the calls that no quota holds, in turn; the one just yielded may be removed."""
        # Not a generator: what is held must be known even if no call is ever asked for.
        return self._merged(self._turns_of(self._queues, passed_over))

    def find_held(self) -> None:
        """As `walk` without asking for a call."""
        self._turns_of(self._with_quota, ())

    def _turns_of(
        self, queues: Mapping[str, TenantQueue], passed_over: Container[Kind]
    ) -> list[Turn]:
        shares = self._ledger.shares()
        turns = []
        for tenant_id, queue in queues.items():
            turn = Turn(tenant_id, queue, self._ledger, shares, passed_over)
            head = queue.only_head
            if head is not None:
                turn.head = head
                turns.append(turn)
                continue
            turn.calls = queue.walk(turn.passed_over)
            if self._go_on(turn):
                turns.append(turn)
        return turns

    def _merged(self, turns: list[Turn]) -> Iterator[Waiting]:
        """Merge what tenants have.

        On the way a tenant's virtual time only grows, and so does the lag: who has come within
        it stays so until its turn.
        """
        by_time: list[At] = []
        for number, turn in enumerate(turns):
            turn.number = number
            by_time.append((turn.account.virtual_time, number, 0, turn))
        heapify(by_time)
        limit = by_time[0][0] + self._ledger.lag_s if by_time else 0.0
        within = [(at[3].head.place, at[3]) for at in by_time if at[0] <= limit]
        beyond = [at for at in by_time if at[0] > limit]
        heapify(within)
        heapify(beyond)
        while beyond or within:
            while by_time[0][3].num_moves != by_time[0][2]:  # has moved on since, or is through
                heappop(by_time)
            limit = by_time[0][0] + self._ledger.lag_s
            while beyond and beyond[0][0] <= limit:
                turn = heappop(beyond)[3]
                heappush(within, (turn.head.place, turn))
            turn = heappop(within)[1]
            head = turn.head
            turn.begin()
            yield head
            if head.request.request_id in self:
                turn.pass_over()
            turn.num_moves += 1
            if self._go_on(turn):
                at = (turn.virtual_time, turn.number, turn.num_moves, turn)
                heappush(by_time, at)
                heappush(beyond, at)

    def _go_on(self, turn: Turn) -> bool:
        """Find the next call of a tenant that may be sent; the others' are not concerned."""
        if turn.calls is None:
            turn.calls = after(turn.head, turn.queue.walk(turn.passed_over))
        while (waiting := next(turn.calls, None)) is not None:
            time, quota = turn.account.ready_time(waiting.request, self.now)
            if time <= self.now:
                turn.head = waiting
                return True
            self._ledger.hold(waiting.request, quota, self.now)
            self.held_until = min(self.held_until, max(time, self.now + _MIN_HOLD_S))
            if quota != "runs":
                return False
            # No call of another new run can go before that, but one of a run under way can.
            under_way = turn.account.runs_under_way(self.now)
            for request in turn.queue.not_seen_outside(under_way):
                self._ledger.hold(request, quota, self.now)
            turn.calls = turn.queue.walk_runs(under_way, turn.passed_over, waiting)
        return False
