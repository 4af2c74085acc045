"""The calls that wait in front of the instances, in the order of a policy."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Container, Iterator
from heapq import merge
from itertools import islice
from typing import Final, final

from vllm_workflow.core.types import StageRequest

Kind = tuple[str, tuple[str, ...]]
"""Model and excluded instances: what decides which instances come into question."""


Place = tuple[int, int, float, int]
"""Priority; level, of which a lower one goes first; key from the ordering policy, of which a
smaller one goes first; order of arrival, in which no two are alike."""


@final
class Waiting:
    """One call that no instance has been chosen for yet."""

    __slots__ = ("exclude", "kind", "num_prompt_bytes", "place", "request")

    place: Final[Place]
    request: Final[StageRequest]
    num_prompt_bytes: Final[int]
    exclude: Final[tuple[str, ...]]
    kind: Final[Kind]

    def __init__(
        self, place: Place, request: StageRequest, num_prompt_bytes: int, exclude: tuple[str, ...]
    ) -> None:
        self.place = place
        self.request = request
        self.num_prompt_bytes = num_prompt_bytes
        self.exclude = exclude
        self.kind = (request.model, exclude)

    def __lt__(self, other: Waiting) -> bool:
        """Whether it goes before another one."""
        return self.place < other.place


@final
class _Line:
    """The calls of one kind, sorted, and their places beside them, which compare faster."""

    __slots__ = ("calls", "places")

    def __init__(self) -> None:
        self.calls: list[Waiting] = []
        self.places: list[Place] = []


class Backlog:
    """Waiting calls, sorted. A call's place never changes, so adding one is a binary search.

    They are kept by kind, so that all for which there is no room are passed over at once.
    """

    def __init__(self) -> None:
        self._by_kind: dict[Kind, _Line] = {}
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
        place = (request.priority, level, key, self._num_added)
        waiting = Waiting(place, request, num_prompt_bytes, exclude)
        self._insert(waiting)
        return waiting

    def _insert(self, waiting: Waiting) -> None:
        line = self._by_kind.get(waiting.kind)
        if line is None:
            line = self._by_kind[waiting.kind] = _Line()
        index = bisect_left(line.places, waiting.place)
        line.places.insert(index, waiting.place)
        line.calls.insert(index, waiting)
        self._by_id[waiting.request.request_id] = waiting

    def remove(self, request_id: str) -> Waiting | None:
        """Take a call out; None if it does not wait."""
        waiting = self._by_id.pop(request_id, None)
        if waiting is not None:
            line = self._by_kind[waiting.kind]
            if len(line.calls) == 1:
                del self._by_kind[waiting.kind]
            index = bisect_left(line.places, waiting.place)
            del line.places[index]
            del line.calls[index]
        return waiting

    def first(self, num_calls: int) -> list[Waiting]:
        """Return those that go first, in order."""
        if len(self._by_kind) == 1:
            for line in self._by_kind.values():
                return line.calls[:num_calls]
        return list(islice(self, num_calls))

    def heads(self) -> list[Waiting]:
        """Return the first call of each kind, in order."""
        return sorted([line.calls[0] for line in self._by_kind.values()])

    def has_model(self, model: str) -> bool:
        """Whether a call of a model waits."""
        return model in [kind[0] for kind in self._by_kind]

    def walk(self, passed_over: Container[Kind]) -> Iterator[Waiting]:
        """Yield the calls in order; each may be removed before the next is asked for.

        Args:
            passed_over: Kinds of which no further call is yielded; may grow on the way.
        """
        each = [_walk(kind, line.calls, passed_over) for kind, line in self._by_kind.items()]
        return merge(*each) if len(each) > 1 else each[0] if each else iter(())

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._by_id

    def __iter__(self) -> Iterator[Waiting]:
        each = [line.calls for line in self._by_kind.values()]
        return merge(*each) if len(each) > 1 else iter(each[0] if each else ())

    def __len__(self) -> int:
        return len(self._by_id)


def _walk(kind: Kind, calls: list[Waiting], passed_over: Container[Kind]) -> Iterator[Waiting]:
    at = 0
    while at < len(calls) and kind not in passed_over:
        waiting = calls[at]
        yield waiting
        if at < len(calls) and calls[at] is waiting:
            at += 1
