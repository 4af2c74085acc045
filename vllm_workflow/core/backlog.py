"""The calls that wait in front of the instances, in the order of a policy."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Container, Iterator
from heapq import merge
from itertools import islice
from typing import NamedTuple

from vllm_workflow.core.types import StageRequest

Kind = tuple[str, tuple[str, ...]]
"""Model and excluded instances: what decides which instances come into question."""


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
    kind: Kind


class Backlog:
    """Waiting calls, sorted. A call's place never changes, so adding one is a binary search.

    They are kept by kind, so that all for which there is no room are passed over at once.
    """

    def __init__(self) -> None:
        self._by_kind: dict[Kind, list[Waiting]] = {}
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
        kind = (request.model, exclude)
        waiting = Waiting(
            request.priority, level, key, self._num_added, request, num_prompt_bytes, exclude, kind
        )
        self._insert(waiting)
        return waiting

    def _insert(self, waiting: Waiting) -> None:
        insort(self._by_kind.setdefault(waiting.kind, []), waiting)
        self._by_id[waiting.request.request_id] = waiting

    def remove(self, request_id: str) -> Waiting | None:
        """Take a call out; None if it does not wait."""
        waiting = self._by_id.pop(request_id, None)
        if waiting is not None:
            calls = self._by_kind[waiting.kind]
            del calls[bisect_left(calls, waiting)]
            if not calls:
                del self._by_kind[waiting.kind]
        return waiting

    def first(self, num_calls: int) -> list[Waiting]:
        """Return those that go first, in order."""
        return list(islice(self, num_calls))

    def heads(self) -> list[Waiting]:
        """Return the first call of each kind, in order."""
        return sorted([calls[0] for calls in self._by_kind.values()])

    def has_model(self, model: str) -> bool:
        """Whether a call of a model waits."""
        return model in [kind[0] for kind in self._by_kind]

    def walk(self, passed_over: Container[Kind]) -> Iterator[Waiting]:
        """Yield the calls in order; each may be removed before the next is asked for.

        Args:
            passed_over: Kinds of which no further call is yielded; may grow on the way.
        """
        each = [_walk(kind, calls, passed_over) for kind, calls in self._by_kind.items()]
        return each[0] if len(each) == 1 else merge(*each)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._by_id

    def __iter__(self) -> Iterator[Waiting]:
        each = list(self._by_kind.values())
        return iter(each[0]) if len(each) == 1 else merge(*each)

    def __len__(self) -> int:
        return len(self._by_id)


def _walk(kind: Kind, calls: list[Waiting], passed_over: Container[Kind]) -> Iterator[Waiting]:
    at = 0
    while at < len(calls) and kind not in passed_over:
        waiting = calls[at]
        yield waiting
        if at < len(calls) and calls[at] is waiting:
            at += 1
