"""Engine steps that differ only in the context that grows: their durations in closed form."""

from __future__ import annotations

import math
from typing import Final

_INF: Final = math.inf

_MAX_STEPS: Final = 1 << 40


class StepSeries:
    """Steps of `first_s`, `first_s + growth_s`, `first_s + 2 growth_s`, … from `start` on."""

    __slots__ = ("first_s", "growth_s", "start")

    def __init__(self, start: float = 0.0, first_s: float = 0.0, growth_s: float = 0.0) -> None:
        self.start = start
        self.first_s = first_s
        self.growth_s = growth_s

    def end(self, num_steps: int) -> float:
        """Instant at which the first `num_steps` steps have ended."""
        half = 0.5 * self.growth_s
        return self.start + (num_steps * self.first_s + half * num_steps * (num_steps - 1))

    def num_steps_until(self, time: float) -> int:
        """Steps until the first that ends at `time` or later, at least 1."""
        wanted_s = time - self.start
        if wanted_s <= self.first_s:
            return 1
        if wanted_s == _INF:
            return _MAX_STEPS
        half = 0.5 * self.growth_s
        b = self.first_s - half
        # The root of half · n² + b · n = wanted_s, in the form that is stable for a small `half`.
        num_steps = math.ceil(2 * wanted_s / (b + math.sqrt(b * b + 4 * half * wanted_s)))
        # Rounding may be off by one either way.
        while self.end(num_steps) < time:
            num_steps += 1
        while num_steps > 1 and self.end(num_steps - 1) >= time:
            num_steps -= 1
        return num_steps
