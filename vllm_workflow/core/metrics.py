"""What results are told in: one definition each, for live runs, benchmarks and simulations.

A run that did not end has a latency of `inf`: it counts among the arrivals and misses every SLO.
What cannot be said of an empty sample is None, never 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

_ROUNDING = 1e-9
"""A share times a count may come out this much above the whole number that is meant."""


def percentile(values: Sequence[float], percent: float) -> float | None:
    """Return the value below which `percent` % of a sample lie; None for an empty one.

    Linear interpolation between the two closest ranks, at `percent / 100 · (n − 1)` from the
    smallest: what NumPy and `vllm bench serve` do by default. Next to `inf` it is `inf`.

    Args:
        values: In any order; `inf` for what did not end.
        percent: From 0 to 100.

    Raises:
        ValueError: A `percent` out of range, or a value that is `nan`.
    """
    if not 0.0 <= percent <= 100.0:
        raise ValueError(f"percent: expected 0 to 100, got {percent!r}")
    if any(math.isnan(v) for v in values):
        raise ValueError("values: expected numbers, got nan; what did not end is inf")
    if not values:
        return None
    ordered = sorted(values)
    rank = percent / 100.0 * (len(ordered) - 1)
    below = math.floor(rank)
    share = rank - below
    if share == 0.0:
        return ordered[below]
    low, high = ordered[below], ordered[below + 1]
    return high if math.isinf(high) else low + share * (high - low)


def mean(values: Sequence[float]) -> float | None:
    """Return the arithmetic mean; None for an empty sample."""
    return math.fsum(values) / len(values) if values else None


def num_met(latencies_s: Sequence[float], slos_s: Sequence[float | None]) -> int:
    """Count the runs that ended within their SLO; a run without one meets nothing.

    Args:
        latencies_s: End to end, of every run that arrived, shape (n,); `inf` if it did not end.
        slos_s: What was promised, shape (n,); None where nothing was.
    """
    _same_length(latencies_s, slos_s)
    return sum(
        slo is not None and latency <= slo and latency < math.inf
        for latency, slo in zip(latencies_s, slos_s)
    )


def slo_attainment(latencies_s: Sequence[float], slos_s: Sequence[float | None]) -> float | None:
    """Return the share of all arrivals with an SLO that met it; None if no run had one.

    Unfinished, refused and failed runs are arrivals that missed. See `num_met`.
    """
    num_promised = sum(slo is not None for slo in slos_s)
    met = num_met(latencies_s, slos_s)
    return met / num_promised if num_promised else None


def goodput(
    latencies_s: Sequence[float], slos_s: Sequence[float | None], duration_s: float
) -> float | None:
    """Return the runs per second that met their SLO; None without a duration.

    Args:
        latencies_s: See `num_met`.
        slos_s: See `num_met`.
        duration_s: From the first arrival to the last end.
    """
    met = num_met(latencies_s, slos_s)
    return met / duration_s if 0.0 < duration_s < math.inf else None


def throughput(latencies_s: Sequence[float], duration_s: float) -> float | None:
    """Return the runs per second that ended, on time or not; None without a duration."""
    num_ended = sum(latency < math.inf for latency in latencies_s)
    return num_ended / duration_s if 0.0 < duration_s < math.inf else None


def slo_scale_at(
    share: float, latencies_s: Sequence[float], references_s: Sequence[float]
) -> float | None:
    """Return the smallest scale at which `share` of all arrivals meet `scale · reference`.

    Args:
        share: Above 0, at most 1; no interpolation: 0.95 of 10 runs is all of them.
        latencies_s: See `num_met`.
        references_s: Duration that each run's SLO is a multiple of, shape (n,), each above 0.

    Returns:
        `inf` if too few runs ended for any scale to do; None for an empty sample.

    Raises:
        ValueError: A share or a reference out of range.
    """
    if not 0.0 < share <= 1.0:
        raise ValueError(f"share: expected above 0 and at most 1, got {share!r}")
    _same_length(latencies_s, references_s)
    if any(not 0.0 < reference < math.inf for reference in references_s):
        raise ValueError("references_s: expected durations above 0")
    scales = sorted(latency / reference for latency, reference in zip(latencies_s, references_s))
    if not scales:
        return None
    return scales[math.ceil(share * len(scales) - _ROUNDING) - 1]


def _same_length(one: Sequence[object], other: Sequence[object]) -> None:
    if len(one) != len(other):
        raise ValueError(f"expected two values per run, got {len(one)} and {len(other)}")
