"""The calls that wait in front of the instances, in the order of a policy."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from vllm_workflow.core.types import StageRequest


class Waiting(NamedTuple):
    """One call that no instance has been chosen for yet."""

    priority: int
    level: int
    """Calls of a lower level go first."""
    key: float
    """From the ordering policy: smaller goes first."""
    sequence: int
    """Order of arrival; no two are alike, so that nothing below is ever compared."""
    request: StageRequest
    num_prompt_bytes: int
    exclude: tuple[str, ...]


class Backlog:
    """Waiting calls, sorted. A call's place never changes, so adding one is a binary search."""

    held_until: float = math.inf
    """Instant from which a call may start that could not although there was room."""

    def __init__(self) -> None:
        self._sorted: list[Waiting] = []
        self._by_id: dict[str, Waiting] = {}
        self._num_added = 0

    def add(
        self,
        request: StageRequest,
        key: float,
        num_prompt_bytes: int = 0,
        exclude: tuple[str, ...] = (),
        *,
        level: int = 0,
    ) -> Waiting:
        """Give a call its place.

        Raises:
            ValueError: It waits already.
        """
        if request.request_id in self._by_id:
            raise ValueError(f"request {request.request_id!r} is already waiting")
        self._num_added += 1
        waiting = Waiting(
            request.priority, level, key, self._num_added, request, num_prompt_bytes, exclude
        )
        insort(self._sorted, waiting)
        self._by_id[request.request_id] = waiting
        return waiting

    def remove(self, request_id: str) -> Waiting | None:
        """Take a call out; None if it does not wait."""
        waiting = self._by_id.pop(request_id, None)
        if waiting is not None:
            del self._sorted[bisect_left(self._sorted, waiting)]
        return waiting

    def first(self, num_calls: int) -> list[Waiting]:
        """Return those that go first, in order."""
        return self._sorted[:num_calls]

    def in_turn(self, now: float) -> Iterable[Waiting]:
        """Return those that may start now, first in order first; each may be removed meanwhile."""
        return list(self._sorted)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._by_id

    def __iter__(self) -> Iterator[Waiting]:
        return iter(self._sorted)

    def __len__(self) -> int:
        return len(self._sorted)
