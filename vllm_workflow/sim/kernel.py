"""A clock and a heap: events happen in order of time, then priority, then of being announced."""

from __future__ import annotations

import math
from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any


class Kernel:
    """Runs what was announced, in order; the clock never goes back."""

    __slots__ = ("_heap", "_num_announced", "now")

    def __init__(self) -> None:
        self.now = 0.0
        self._heap: list[tuple[float, int, int, Callable[[Any], None], Any]] = []
        self._num_announced = 0

    def at(
        self, time: float, action: Callable[[Any], None], value: object, priority: int = 0
    ) -> None:
        """Announce that `action(value)` happens at `time`.

        Args:
            time: Instant, at least `now`.
            action: Called once.
            value: Handed to it.
            priority: Of several at one instant the smallest goes first.

        Raises:
            ValueError: The instant is past, or `nan`.
        """
        if not time >= self.now:
            raise ValueError(f"time: expected at least now = {self.now!r}, got {time!r}")
        self._num_announced += 1
        heappush(self._heap, (time, priority, self._num_announced, action, value))

    def run(self, until: float = math.inf) -> None:
        """Do everything up to and including `until`; what lies behind it is never done."""
        heap = self._heap
        while heap and heap[0][0] <= until:
            self.now, _, _, action, value = heappop(heap)
            action(value)
