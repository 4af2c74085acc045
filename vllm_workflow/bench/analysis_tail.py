"""What sets the slowest runs apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vllm_workflow.bench.analysis_timing import Timeline


@dataclass(frozen=True, slots=True, kw_only=True)
class Cause:
    """What one stage adds to the difference between slow runs and the others, in seconds."""

    stage: str
    num_calls_slow: float
    """Calls of the stage on the critical path, mean over slow runs."""
    num_calls_rest: float
    more_calls_s: float
    """Because there are more of them on the critical path."""
    longer_calls_s: float
    """Because each takes longer."""

    @property
    def total_s(self) -> float:
        return self.more_calls_s + self.longer_calls_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Tail:
    """The slowest runs against the others."""

    num_slow: int
    threshold_s: float
    """Duration of the fastest of the slow runs."""
    mean_slow_s: float
    mean_rest_s: float
    causes: tuple[Cause, ...]
    """The largest first. With `gap_s` they sum to the difference of the means."""
    gap_s: float
    """What longer gaps on the critical path add."""


def tail(timelines: Sequence[Timeline], share: float = 0.05) -> Tail | None:
    """Compare the slowest `share` of the runs, at least one, with the others.

    The difference in a stage's seconds n·t on the critical path (n calls of t seconds) is
    divided as (n₁ − n₂)(t₁ + t₂)/2 for more calls and (t₁ − t₂)(n₁ + n₂)/2 for longer ones.
    A stage that one side does not have has the other side's t.

    Returns:
        None if there are fewer than two runs.
    """
    if len(timelines) < 2:
        return None
    ordered = sorted(timelines, key=lambda line: line.duration_s, reverse=True)
    num_slow = min(len(ordered) - 1, max(1, math.ceil(share * len(ordered) - 1e-9)))
    slow, rest = ordered[:num_slow], ordered[num_slow:]
    stages = dict.fromkeys(timed.call.stage for line in timelines for timed in line.critical)
    causes = [_cause(stage, slow, rest) for stage in stages]
    return Tail(
        num_slow=num_slow,
        threshold_s=slow[-1].duration_s,
        mean_slow_s=_mean([line.duration_s for line in slow]),
        mean_rest_s=_mean([line.duration_s for line in rest]),
        causes=tuple(sorted(causes, key=lambda cause: -abs(cause.total_s))),
        gap_s=_mean([line.gap_s for line in slow]) - _mean([line.gap_s for line in rest]),
    )


def _cause(stage: str, slow: Sequence[Timeline], rest: Sequence[Timeline]) -> Cause:
    (num_1, each_1), (num_2, each_2) = (_on_path(stage, side) for side in (slow, rest))
    each_1, each_2 = each_1 if num_1 else each_2, each_2 if num_2 else each_1
    return Cause(
        stage=stage,
        num_calls_slow=num_1,
        num_calls_rest=num_2,
        more_calls_s=(num_1 - num_2) * (each_1 + each_2) / 2,
        longer_calls_s=(each_1 - each_2) * (num_1 + num_2) / 2,
    )


def _on_path(stage: str, lines: Sequence[Timeline]) -> tuple[float, float]:
    """Return calls of a stage on the critical path per run, and mean seconds of one."""
    services = [
        timed.service_s for line in lines for timed in line.critical if timed.call.stage == stage
    ]
    return len(services) / len(lines), _mean(services) if services else 0.0


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
