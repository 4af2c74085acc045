"""The calls that wait, tenant by tenant: whose turn it is, and which of its calls goes first."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Iterator

from vllm_workflow.core.backlog import Backlog, Waiting
from vllm_workflow.core.tenant_ledger import Account, TenantLedger
from vllm_workflow.core.types import StageRequest

_MIN_HOLD_S = 1e-3
"""Nobody looks again sooner than this whether a quota has room."""


_MAX_PASSED = 64
"""Calls of a guest that are looked at beyond one that found no room: of other models."""


class TenantBacklog(Backlog):
    """As `Backlog`, in an order that keeps tenants to their shares and quotas.

    Of the tenants that are no more than `lag` ahead of the waiting one that has had least, the
    call that the policy puts first goes first. So as long as tenants keep level, as those do
    that stay within their shares, calls go by their slack whoever they belong to; a tenant
    that runs ahead is held behind the others, and inside a tenant slack decides always. What
    the others leave it takes: a call waits for a share only while a call of another tenant
    waits.

    Args:
        ledger: Of the tenants.
    """

    def __init__(self, ledger: TenantLedger) -> None:
        super().__init__()
        self._ledger = ledger
        self._queues: dict[str, list[Waiting]] = {}

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
        insort(self._queues.setdefault(request.tenant_id, []), waiting)
        return waiting

    def remove(self, request_id: str) -> Waiting | None:
        waiting = super().remove(request_id)
        if waiting is not None:
            queue = self._queues[waiting.request.tenant_id]
            del queue[bisect_left(queue, waiting)]
            if not queue:
                del self._queues[waiting.request.tenant_id]
        return waiting

    def in_turn(self, now: float) -> Iterator[Waiting]:
        """Yield the calls that no quota holds, in turn; the one just yielded may be removed.

        `held_until` is set at once to when a quota that holds a call now will have room.
        """
        self.held_until = math.inf
        turns = [
            _Turn(queue, self._ledger.account(tenant_id))
            for tenant_id, queue in self._queues.items()
        ]
        return self._merged([turn for turn in turns if self._find_head(turn, now)], now)

    def _merged(self, turns: list[_Turn], now: float) -> Iterator[Waiting]:
        while turns:
            turn = turns[0] if len(turns) == 1 else self._next(turns)
            head = turn.head
            assert head is not None
            yield head
            if head.request.request_id in self:
                # It could not start. What comes after it is another tenant's as if it had.
                turn.index += 1
                turn.passed_s += self._ledger.work_s(head.request.request_id)
                if self._ledger.is_guest(head.request.tenant_id):
                    turn.refuse(head)
            if not self._find_head(turn, now):
                turns.remove(turn)

    def _next(self, turns: list[_Turn]) -> _Turn:
        limit = min(turn.virtual_time for turn in turns) + self._ledger.lag_s
        level = [turn for turn in turns if turn.virtual_time <= limit]
        return min(level, key=_head)

    def _find_head(self, turn: _Turn, now: float) -> bool:
        """Find a tenant's next call that may be sent; the others' order does not change."""
        while turn.index < min(len(turn.queue), turn.last):
            request = turn.queue[turn.index].request
            if turn.refused and (request.model, turn.queue[turn.index].exclude) in turn.refused:
                turn.index += 1
                continue
            time, quota = turn.account.ready_time(request, now)
            if time <= now:
                turn.head = turn.queue[turn.index]
                return True
            self._ledger.hold(request, quota, now)
            self.held_until = min(self.held_until, max(time, now + _MIN_HOLD_S))
            if quota != "runs":  # a call of a run that is under way may still go
                return False
            turn.index += 1
        return False


class _Turn:
    """One tenant's queue, and how far it has been looked through."""

    __slots__ = ("account", "head", "index", "last", "passed_s", "queue", "refused")

    def __init__(self, queue: list[Waiting], account: Account) -> None:
        self.queue = queue
        self.account = account
        self.index = 0
        self.last = len(queue)
        self.refused: set[tuple[str, tuple[str, ...]]] = set()
        """Model and excluded instances of calls that found no room that others can spare."""
        self.passed_s = 0.0
        self.head: Waiting | None = None

    def refuse(self, head: Waiting) -> None:
        if not self.refused:
            self.last = self.index + _MAX_PASSED
        self.refused.add((head.request.model, head.exclude))

    @property
    def virtual_time(self) -> float:
        return self.account.virtual_time + self.passed_s / self.account.config.weight


def _head(turn: _Turn) -> Waiting:
    assert turn.head is not None
    return turn.head
