"""A request queue behind vLLM's interface, ordered by a key that is frozen at insertion."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

from vllm.v1.core.sched.request_queue import RequestQueue
from vllm.v1.request import Request

Key: TypeAlias = tuple[float, ...]
_Entry: TypeAlias = tuple[Key, int, Any]

MIN_DEAD_ENTRIES = 64
"""Below this many deleted entries the heap is never rebuilt."""


class OrderedRequestQueue(RequestQueue):
    """Smallest key first; first come, first served among equal keys.

    A heap with lazy deletion: a removed request leaves a dead entry behind, which is dropped
    when it comes to the top, or with all others once they outnumber the live ones. Adding and
    taking cost O(log n), removing k requests O(k).

    To *prepend* is to come first among equals: a preempted request does not overtake a more
    urgent one, but it does overtake those of its own kind that came later.
    """

    def __init__(self, key: Callable[[Request], Key], requests: Iterable[Request] = ()) -> None:
        """Make a queue of `requests`, which are added in the order given.

        Args:
            key: Rank of a request, asked once each time a request is inserted.
            requests: First contents.
        """
        self._key = key
        self._back = itertools.count()
        self._front = itertools.count(-1, -1)
        entries: list[_Entry] = [(key(r), next(self._back), r) for r in requests]
        self._live = {e[2].request_id: e for e in entries}
        self._heap = list(self._live.values())
        heapq.heapify(self._heap)

    def add_request(self, request: Request) -> None:
        self._push(request, next(self._back))

    def prepend_request(self, request: Request) -> None:
        self._push(request, next(self._front))

    def prepend_requests(self, requests: Iterable[Request]) -> None:
        """Prepend one after the other: the last one ends up first, as in vLLM's own queue."""
        for request in requests:
            self.prepend_request(request)

    def peek_request(self) -> Request:
        self._drop_dead_head()
        if not self._heap:
            raise IndexError("peek from an empty queue")
        return self._heap[0][2]

    def pop_request(self) -> Request:
        self._drop_dead_head()
        if not self._heap:
            raise IndexError("pop from an empty queue")
        request = heapq.heappop(self._heap)[2]
        del self._live[request.request_id]
        return request

    def remove_request(self, request: Request) -> None:
        if request.request_id not in self._live:
            raise ValueError(f"request {request.request_id!r} is not in the queue")
        self.remove_requests((request,))

    def remove_requests(self, requests: Iterable[Request]) -> None:
        """Remove those of `requests` that are here; vLLM asks every queue for every request."""
        for request in requests:
            self._live.pop(request.request_id, None)
        self._compact()

    def rekey_request(self, request: Request) -> None:
        """Rank a request anew, if it is here."""
        entry = self._live.get(request.request_id)
        if entry is not None:
            self._push(request, entry[1])

    def first(self, n: int) -> list[Request]:
        """The first `n` requests in order, without sorting the others.

        Looks at no more than 8 n entries; among many dead ones it may find fewer than `n`.
        """
        self._drop_dead_head()
        heap, found = self._heap, list[Request]()
        frontier = [(heap[0], 0)] if heap else []
        for _ in range(8 * n):
            if not frontier or len(found) == n:
                break
            entry, index = heapq.heappop(frontier)
            if self._live.get(entry[2].request_id) is entry:
                found.append(entry[2])
            for child in (2 * index + 1, 2 * index + 2):
                if child < len(heap):
                    heapq.heappush(frontier, (heap[child], child))
        return found

    def __bool__(self) -> bool:
        return bool(self._live)

    def __len__(self) -> int:
        return len(self._live)

    def __iter__(self) -> Iterator[Request]:
        """Iterate over a snapshot, in order."""
        return iter([entry[2] for entry in sorted(self._live.values(), key=lambda e: e[:2])])

    def __getitem__(self, index: int) -> Request:
        """The request at a place in the order; O(n log n), for tests and debugging."""
        return list(self)[index]

    @property
    def num_entries(self) -> int:
        """Entries in memory, dead ones included."""
        return len(self._heap)

    def _push(self, request: Request, sequence: int) -> None:
        entry: _Entry = (self._key(request), sequence, request)
        self._live[request.request_id] = entry
        heapq.heappush(self._heap, entry)
        self._compact()

    def _drop_dead_head(self) -> None:
        heap = self._heap
        while heap and self._live.get(heap[0][2].request_id) is not heap[0]:
            heapq.heappop(heap)

    def _compact(self) -> None:
        if len(self._heap) > 2 * len(self._live) + MIN_DEAD_ENTRIES:
            self._heap = list(self._live.values())
            heapq.heapify(self._heap)
