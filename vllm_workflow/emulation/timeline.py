"""When the steps of an emulated GPU begin and end, and how far the CPU lagged behind that."""

from __future__ import annotations

import bisect
import math

LATENESS_BUCKETS_S = (
    *(0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0),
    math.inf,
)


class Timeline:
    """One emulated GPU. Instants are `time.monotonic()`, durations are wall-clock time.

    As on a device with a queue, a step that is launched while another one runs begins when that
    one ends. Whatever the CPU does meanwhile costs nothing; what it does while the GPU has
    nothing to run is lost, there as here.
    """

    def __init__(self, *, time_scale: float) -> None:
        self._time_scale = time_scale
        self._free_at = -math.inf
        self.num_steps = 0
        self.busy_s = 0.0
        """Time in steps, as planned."""
        self.stalled_s = 0.0
        """Time in no step although a request that was running before waited for its next one.

        Requests that wait for their first step are not seen here: the worker hears of them with
        that step.
        """
        self.late_s = 0.0
        """Sum over steps: from the planned end to when the output was really handed over."""
        self.late_counts = [0] * len(LATENESS_BUCKETS_S)
        """Steps per bucket of that, not cumulative."""

    def launch(self, step_s: float, now: float, *, continues: bool) -> float:
        """Queue a step; return the instant at which it ends.

        Args:
            step_s: How long the GPU takes for it.
            now: The CPU is done with scheduling it.
            continues: Requests of it were running before.
        """
        start = self._free_at
        if now > start:
            if continues:
                self.stalled_s += now - start
            start = now
        duration_s = step_s / self._time_scale
        self.num_steps += 1
        self.busy_s += duration_s
        self._free_at = start + duration_s
        return self._free_at

    def handed_over(self, end: float, now: float) -> None:
        """Take note that the output of the step that ended at `end` is with the scheduler now."""
        late_s = max(0.0, now - end)
        self.late_s += late_s
        self.late_counts[bisect.bisect_left(LATENESS_BUCKETS_S, late_s)] += 1
