"""The calls of one tenant that wait, and how far they have been looked through."""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable, Iterator
from heapq import merge
from typing import final

from vllm_workflow.core.backlog import Backlog, Kind, Waiting
from vllm_workflow.core.tenant_account import run_key
from vllm_workflow.core.tenant_ledger import Shares, TenantLedger
from vllm_workflow.core.tenants import TenantConfig
from vllm_workflow.core.types import StageRequest


class TenantQueue(Backlog):
    """The calls of one tenant.

    Args:
        config: What goes for the tenant.
    """

    def __init__(self, config: TenantConfig) -> None:
        super().__init__()
        self.has_quota = config.has_quota
        by_run = config.max_concurrent_runs is not None
        self._runs: dict[str, Backlog] | None = {} if by_run else None
        self._not_seen: dict[str, dict[str, StageRequest]] = {}
        """By run, calls that `not_seen_outside` has not returned."""

    def _insert(self, waiting: Waiting) -> None:
        super()._insert(waiting)
        if self._runs is not None:
            request, key = waiting.request, run_key(waiting.request)
            self._runs.setdefault(key, Backlog())._insert(waiting)
            self._not_seen.setdefault(key, {})[request.request_id] = request

    def remove(self, request_id: str) -> Waiting | None:
        waiting = super().remove(request_id)
        if waiting is not None and self._runs is not None:
            key = run_key(waiting.request)
            self._runs[key].remove(request_id)
            self._not_seen.get(key, {}).pop(request_id, None)
            if not len(self._runs[key]):
                del self._runs[key]
                self._not_seen.pop(key, None)
        return waiting

    @property
    def only_head(self) -> Waiting | None:
        """The first call, if none but its own kind waits and no quota can hold it."""
        if self.has_quota or len(self._by_kind) != 1:
            return None
        (line,) = self._by_kind.values()
        return line.calls[0]

    def walk_runs(
        self, keys: Iterable[str], passed_over: Container[Kind], last: Waiting
    ) -> Iterator[Waiting]:
        """As `walk`, those of some runs that come after a call."""
        runs = self._runs or {}
        each = [runs[key].walk(passed_over) for key in keys if key in runs]
        return after(last, merge(*each))

    def not_seen_outside(self, keys: Collection[str]) -> Iterator[StageRequest]:
        """Yield the calls of all runs but some, each once."""
        outside = [key for key in self._not_seen if key not in keys]
        for key in outside:
            yield from self._not_seen.pop(key).values()


@final
class Turn:
    """One tenant's queue, and how far it has been looked through."""

    __slots__ = (
        "_is_guest",
        "_ledger",
        "_passed_s",
        "_refused",
        "_shares",
        "_tenant_id",
        "account",
        "calls",
        "head",
        "num_moves",
        "number",
        "passed_over",
        "queue",
    )

    head: Waiting

    def __init__(
        self,
        tenant_id: str,
        queue: TenantQueue,
        ledger: TenantLedger,
        shares: Shares,
        passed_over: Container[Kind],
    ) -> None:
        self.account = ledger.account(tenant_id)
        self.queue = queue
        self._tenant_id = tenant_id
        self._ledger = ledger
        self._shares = shares
        self._is_guest: bool | None = None
        self._passed_s = 0.0
        self._refused: set[Kind] = set()
        self.passed_over = _Either(passed_over, self._refused)
        self.calls: Iterator[Waiting] | None = None
        self.number = 0
        """That no other has."""
        self.num_moves = 0
        """Calls of it that have had their turn."""

    def begin(self) -> None:
        """To be called before a call of it is yielded; most turns never come."""
        if self._is_guest is None:
            self._is_guest = self._ledger.is_guest(self._tenant_id, self._shares)

    @property
    def virtual_time(self) -> float:
        return self.account.virtual_time + self._passed_s / self.account.config.weight

    def pass_over(self) -> None:
        """Go on behind a call that cannot start: other tenants' turn comes as if it had."""
        self._passed_s += self._ledger.work_s(self.head.request.request_id)
        if self._is_guest:  # where others cannot spare room for one, they can for none
            self._refused.add(self.head.kind)


At = tuple[float, int, int, Turn]
"""A tenant's virtual time when it was last known; its number, its moves until then."""


def after(last: Waiting, calls: Iterator[Waiting]) -> Iterator[Waiting]:
    for waiting in calls:
        if last < waiting:
            yield waiting


class _Either:
    """What is in one of two containers."""

    __slots__ = ("_one", "_other")

    def __init__(self, one: Container[Kind], other: Container[Kind]) -> None:
        self._one = one
        self._other = other

    def __contains__(self, kind: object) -> bool:
        return kind in self._one or kind in self._other
