"""Where a scheduler reads the time: from the module `time`, or from a simulation."""

from __future__ import annotations

from typing import Protocol


class Clock(Protocol):
    """The two clocks of a process, both in seconds. The module `time` is one."""

    def time(self) -> float:
        """The clock of `Request.arrival_time` and of deadlines."""
        ...

    def monotonic(self) -> float:
        """The clock of pauses between two decisions of one scheduler."""
        ...
