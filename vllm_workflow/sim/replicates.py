"""The same traffic once more, otherwise arranged: what a comparison of policies is repeated on.

One window of traffic says how two policies differ on it, not by how much that differs from one
window to the next. Each replicate has the runs of the window in another order and its pauses
from another beginning on, so bursts stay bursts, and work and span stay the same.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev

from vllm_workflow.core.errors import ConfigError
from vllm_workflow.sim.rng import stream
from vllm_workflow.sim.types import TraceRun


def replicate(runs: Sequence[TraceRun], number: int, seed: int = 0) -> tuple[TraceRun, ...]:
    """Return one arrangement of `runs`, in order of arrival.

    Args:
        runs: At least one, each with an `arrival_s`, in that order.
        number: 0 is the window as it was; others are drawn, each the same every time.
        seed: Of the drawing.

    Raises:
        ConfigError: A run without arrival.
    """
    arrivals = [_arrival_s(run) for run in runs]
    if number == 0:
        return tuple(runs)
    rng = stream(seed, "replicate", number)
    order = list(runs)
    rng.shuffle(order)
    gaps = [later - earlier for earlier, later in itertools.pairwise(arrivals)]
    if gaps:
        first = rng.randrange(len(gaps))
        gaps = gaps[first:] + gaps[:first]
    now, arranged = arrivals[0], []
    for run, gap_s in zip(order, [0.0, *gaps]):
        now += gap_s
        arranged.append(replace(run, arrival_s=now))
    return tuple(arranged)


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Mean of a quantity over replicates, and where it probably lies."""

    mean: float
    low: float
    high: float
    """Of a two-sided Student interval; as `low`, not finite with fewer than two replicates."""


def estimate(values: Sequence[float], confidence: float = 0.95) -> Estimate:
    """Return mean and Student interval of independent values.

    Args:
        values: At least one.
        confidence: That the mean of all such values lies in the interval, above 0 and below 1.
    """
    center = fmean(values)
    if len(values) < 2:
        return Estimate(mean=center, low=-math.inf, high=math.inf)
    half = student_quantile(0.5 + confidence / 2.0, len(values) - 1)
    half *= stdev(values) / math.sqrt(len(values))
    return Estimate(mean=center, low=center - half, high=center + half)


def lower_bound(values: Sequence[float], confidence: float) -> float:
    """Return what the mean of such values exceeds with `confidence`, one-sided (Student).

    `-inf` for fewer than two.
    """
    return estimate(values, 2.0 * confidence - 1.0).low


def student_quantile(share: float, num_degrees: int) -> float:
    """Return the value that a Student variable stays below with probability `share`.

    Args:
        share: From 0.5 on and below 1.
        num_degrees: Of freedom, at least 1.
    """
    low, high = 0.0, 1.0
    while _student_cdf(high, num_degrees) < share:
        high *= 2.0
    for _ in range(60):
        middle = 0.5 * (low + high)
        if _student_cdf(middle, num_degrees) < share:
            low = middle
        else:
            high = middle
    return high


def _student_cdf(value: float, num_degrees: int) -> float:
    """Probability below a value from 0 on; Abramowitz and Stegun 26.7.3 and 26.7.4."""
    angle = math.atan(value / math.sqrt(num_degrees))
    cosine_2 = math.cos(angle) ** 2
    is_odd = num_degrees % 2
    term = math.cos(angle) if is_odd else 1.0
    total = 0.0 if num_degrees == 1 else term
    for k in range(3 if is_odd else 2, num_degrees - 1, 2):
        term *= cosine_2 * (k - 1) / k
        total += term
    total *= math.sin(angle)
    within = 2.0 / math.pi * (angle + total) if is_odd else total
    return 0.5 + 0.5 * within


def _arrival_s(run: TraceRun) -> float:
    if run.arrival_s is None:
        raise ConfigError(f"run {run.run_id!r}: expected an arrival, got none")
    return run.arrival_s
