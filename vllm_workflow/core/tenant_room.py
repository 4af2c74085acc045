"""Where the calls of several tenants wait: whose turn it is, and which of its calls goes first."""

from __future__ import annotations

import math
from collections.abc import Collection, Container, Iterator

from vllm_workflow.core.backlog import Backlog, Kind, Waiting
from vllm_workflow.core.config import PolicyConfig
from vllm_workflow.core.dispatch import DispatchPolicy
from vllm_workflow.core.fleet import Fleet
from vllm_workflow.core.tenant_ledger import GUEST_MARGIN, TenantLedger
from vllm_workflow.core.types import Candidate, StageRequest
from vllm_workflow.core.waiting_room import Choice, WaitingRoom

_MIN_HOLD_S = 1e-3
"""Nobody looks again sooner than this whether a quota has room."""


class TenantWaitingRoom(WaitingRoom):
    """As `WaitingRoom`, keeping tenants to their shares and quotas.

    Without late binding, where instances queue calls themselves, only quotas hold calls here.

    Args:
        fleet: What they wait for.
        policy: Chooses among the instances that can start a call.
        config: Order of the calls, and whether runs are relegated.
        ledger: Of the tenants.
    """

    def __init__(
        self, fleet: Fleet, policy: DispatchPolicy, config: PolicyConfig, ledger: TenantLedger
    ) -> None:
        super().__init__(fleet, policy, config)
        # Runs begin by their tenants' turns, which an order of runs among all would undo.
        self._relegates = False
        self._ledger = ledger
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
        yield from super().starting(now) if self._config.late_binding else self._released(now)

    @property
    def held_until(self) -> float:
        backlog, relegated = self._turns
        return min(backlog.held_until, relegated.held_until)

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
        them cost, and under a flood there are many; how far off it is, drift tells."""
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
        self._queues: dict[str, Backlog] = {}

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
        self._queues.setdefault(request.tenant_id, Backlog())._insert(waiting)
        return waiting

    def remove(self, request_id: str) -> Waiting | None:
        waiting = super().remove(request_id)
        if waiting is not None:
            tenant_id = waiting.request.tenant_id
            self._queues[tenant_id].remove(request_id)
            if not len(self._queues[tenant_id]):
                del self._queues[tenant_id]
        return waiting

    def walk(self, passed_over: Container[Kind]) -> Iterator[Waiting]:
        """Yield the calls that no quota holds, in turn; the one just yielded may be removed."""
        turns = [
            _Turn(tenant_id, queue, self._ledger, passed_over)
            for tenant_id, queue in self._queues.items()
        ]
        # Not a generator: what is held must be known even if no call is ever asked for.
        return self._merged([turn for turn in turns if self._go_on(turn)])

    def _merged(self, turns: list[_Turn]) -> Iterator[Waiting]:
        while turns:
            turn = turns[0] if len(turns) == 1 else self._next(turns)
            head = turn.head
            yield head
            if head.request.request_id in self:
                turn.pass_over()
            if not self._go_on(turn):
                turns.remove(turn)

    def _next(self, turns: Collection[_Turn]) -> _Turn:
        limit = min(turn.virtual_time for turn in turns) + self._ledger.lag_s
        return min((t for t in turns if t.virtual_time <= limit), key=lambda t: t.head)

    def _go_on(self, turn: _Turn) -> bool:
        """Find the next call of a tenant that may be sent; the others' are not concerned."""
        for waiting in turn.calls:
            time, quota = turn.account.ready_time(waiting.request, self.now)
            if time <= self.now:
                turn.head = waiting
                return True
            self._ledger.hold(waiting.request, quota, self.now)
            self.held_until = min(self.held_until, max(time, self.now + _MIN_HOLD_S))
            if quota != "runs":  # a call of a run that is under way may still go
                return False
        return False


class _Turn:
    """One tenant's queue, and how far it has been looked through."""

    __slots__ = ("_is_guest", "_ledger", "_passed_s", "_refused", "account", "calls", "head")

    head: Waiting

    def __init__(
        self,
        tenant_id: str,
        queue: Backlog,
        ledger: TenantLedger,
        passed_over: Container[Kind],
    ) -> None:
        self.account = ledger.account(tenant_id)
        self._ledger = ledger
        self._is_guest = ledger.is_guest(tenant_id)
        self._passed_s = 0.0
        self._refused: set[Kind] = set()
        self.calls = queue.walk(_Either(passed_over, self._refused))

    @property
    def virtual_time(self) -> float:
        return self.account.virtual_time + self._passed_s / self.account.config.weight

    def pass_over(self) -> None:
        """Go on behind a call that cannot start: other tenants' turn comes as if it had."""
        self._passed_s += self._ledger.work_s(self.head.request.request_id)
        if self._is_guest:  # where others cannot spare room for one, they can for none
            self._refused.add(self.head.kind)


class _Either:
    """What is in one of two containers."""

    __slots__ = ("_one", "_other")

    def __init__(self, one: Container[Kind], other: Container[Kind]) -> None:
        self._one = one
        self._other = other

    def __contains__(self, kind: object) -> bool:
        return kind in self._one or kind in self._other
