"""Whether a run on an emulated GPU can be believed: did the CPU keep up?

Reads what a server shows on `/metrics`, so it needs neither vLLM nor the server's process.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

MAX_LATE_SHARE = 0.1
"""Above this share of the emulated work, what the CPU added makes a run invalid."""

_SAMPLE = re.compile(r'vllm_workflow:emulated_(\w+?)(?:\{(?:.*?\ble="([^"]*)")?.*\})? (\S+)')


@dataclass(frozen=True, slots=True, kw_only=True)
class EmulationCounters:
    """Totals of a server since its start, all of its engines together; wall-clock seconds."""

    num_steps: float = 0.0
    busy_s: float = 0.0
    """In steps, as planned."""
    stalled_s: float = 0.0
    """Between steps, while requests that had been running waited for their next one."""
    late_s: float = 0.0
    """Sum over steps: from the planned end to when the scheduler had the output."""
    late_steps: tuple[tuple[float, float], ...] = ()
    """Per upper bound of lateness: steps at most that late."""

    @classmethod
    def from_metrics(cls, text: str) -> EmulationCounters:
        """Read the text of `/metrics`; all 0 for a server that emulates nothing."""
        totals: dict[str, float] = {}
        late_steps: dict[float, float] = {}
        for name, bound, value in _samples(text):
            if name == "step_lateness_seconds_bucket":
                late_steps[float(bound)] = late_steps.get(float(bound), 0.0) + value
            else:
                totals[name] = totals.get(name, 0.0) + value
        return cls(
            num_steps=totals.get("steps_total", 0.0),
            busy_s=totals.get("busy_seconds_total", 0.0),
            stalled_s=totals.get("stalled_seconds_total", 0.0),
            late_s=totals.get("late_seconds_total", 0.0),
            late_steps=tuple(sorted(late_steps.items())),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Lateness:
    """How far the steps of one run were behind their plan, because the CPU was."""

    num_steps: float
    busy_s: float
    stalled_s: float
    late_s: float
    worst_late_s: float
    """At least as late as the latest step: the upper bound of its histogram bucket."""

    @classmethod
    def between(cls, before: str, after: str) -> Lateness:
        """Compare the `/metrics` of one server before and after a run.

        The server shows its counters at most a few times per second while it works, and at once
        when its last request has ended: take `after` then.
        """
        first = EmulationCounters.from_metrics(before)
        last = EmulationCounters.from_metrics(after)
        counts_before = dict(first.late_steps)
        worst_late_s = below = 0.0
        for bound, count in last.late_steps:  # cumulative, as Prometheus has them
            num_within = count - counts_before.get(bound, 0.0)
            if num_within > below:
                worst_late_s = bound
            below = num_within
        return cls(
            num_steps=last.num_steps - first.num_steps,
            busy_s=last.busy_s - first.busy_s,
            stalled_s=last.stalled_s - first.stalled_s,
            late_s=last.late_s - first.late_s,
            worst_late_s=worst_late_s,
        )

    @property
    def late_share(self) -> float:
        """What the CPU added to a second of emulated work, at most; nan without any work.

        An output that comes late and then makes the next step stall counts twice.
        """
        return (self.stalled_s + self.late_s) / self.busy_s if self.busy_s > 0.0 else math.nan

    @property
    def is_valid(self) -> bool:
        """Whether durations of this run are those of the GPU; false if nothing ran.

        What happens between the engine and a client (HTTP, detokenising) is not looked at.
        """
        return self.late_share <= MAX_LATE_SHARE

    def __str__(self) -> str:
        if not self.busy_s > 0.0:
            return "emulated GPU: no steps; INVALID"
        return (
            f"emulated GPU: {self.num_steps:.0f} steps, {self.busy_s:.2f} s of work, "
            f"{self.late_share:.1%} added by the CPU (stalled {self.stalled_s:.3f} s, outputs late "
            f"{self.late_s:.3f} s, worst at most {self.worst_late_s:g} s); "
            + ("valid" if self.is_valid else f"INVALID: more than {MAX_LATE_SHARE:.0%}")
        )


def _samples(text: str) -> Iterator[tuple[str, str, float]]:
    """Name without prefix, bound of a bucket, value."""
    for line in text.splitlines():
        match = _SAMPLE.fullmatch(line)
        if match:
            yield match[1], match[2] or "", float(match[3])
