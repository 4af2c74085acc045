"""When runs begin."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import accumulate

from vllm_workflow.core.errors import ConfigError
from vllm_workflow.sim.rng import stream
from vllm_workflow.sim.types import Trace


def arrival_times(
    num_runs: int, *, request_rate: float, burstiness: float = 1.0, seed: int = 0
) -> list[float]:
    """Draw when runs arrive, in seconds from 0, as `vllm bench serve` does.

    Gaps are gamma distributed with shape `burstiness`, then stretched so that the last run
    arrives at exactly `num_runs / request_rate`. The same seed at another rate gives the same
    pattern, only faster or slower, so that rates are compared on common random numbers.

    Args:
        num_runs: At least 1.
        request_rate: Runs per second; `inf` lets all arrive at 0.
        burstiness: 1 is a Poisson process, less comes in bursts, more is more regular; `inf`
            makes all gaps equal.
        seed: Of the pattern.

    Raises:
        ConfigError: A number that makes no sense.
    """
    if num_runs < 1:
        raise ConfigError(f"number of runs: expected at least 1, got {num_runs}")
    for name, value in (("request rate", request_rate), ("burstiness", burstiness)):
        if not value > 0:
            raise ConfigError(f"{name}: expected a number above 0, got {value}")
    if request_rate == math.inf:
        return [0.0] * num_runs
    if burstiness == math.inf:
        return [(i + 1) / request_rate for i in range(num_runs)]
    rng = stream(seed, "arrivals")
    gaps = [rng.gammavariate(burstiness, 1.0) for _ in range(num_runs)]
    times = list(accumulate(gaps))
    if not times[-1] > 0.0:  # so bursty that every gap is less than the smallest float
        return [num_runs / request_rate] * num_runs
    stretch = num_runs / times[-1]
    return [time * stretch / request_rate for time in times]


def with_arrivals(
    trace: Trace, request_rate: float | None = None, *, burstiness: float = 1.0, seed: int = 0
) -> Trace:
    """Return the trace with an arrival for every run.

    Args:
        trace: With or without arrivals.
        request_rate: Runs per second, `inf` for all at once; None keeps the trace's own times.
        burstiness: See `arrival_times`.
        seed: See `arrival_times`.

    Raises:
        ConfigError: Own times are wanted and the trace has none, or see `arrival_times`.
    """
    if request_rate is None:
        if trace.runs[0].arrival_s is None:
            raise ConfigError(f"{trace.source}: has no arrivals; expected a request rate")
        return trace
    times = arrival_times(
        len(trace.runs), request_rate=request_rate, burstiness=burstiness, seed=seed
    )
    runs = tuple(replace(run, arrival_s=t) for run, t in zip(trace.runs, times, strict=True))
    return replace(trace, runs=runs)
