"""Numbers of a comparison: a row per simulation, a pair per policy and metric."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vllm_workflow.bench.compare_jobs import Job, Sample
from vllm_workflow.core.metrics import (
    goodput,
    mean,
    percentile,
    slo_attainment,
    slo_scale_at,
    throughput,
)
from vllm_workflow.sim.capacity import steady_window

Row = dict[str, Any]

PAIRED_METRICS = (
    "p95_s",
    "p99_s",
    "mean_s",
    "slo_scale_at_95",
    "slo_scale_at_99",
    "throughput",
    "goodput",
    "attainment",
)
NUM_RESAMPLES = 10_000
_BOOTSTRAP_SEED = 0


def row_of(name: str, job: Job, sample: Sample) -> Row:
    """Return the row of one simulation; see `DEFINITIONS` for what its columns mean."""
    latencies_s = sample.latencies_s
    begin, end = steady_window(sample.arrivals)
    steady = [
        (latency_s, slo_s)
        for arrival, latency_s, slo_s in zip(sample.arrivals, latencies_s, sample.slos_s)
        if begin < arrival + latency_s <= end
    ]
    ended_s = [latency_s for latency_s, _ in steady]
    finished = sum(latency_s < math.inf for latency_s in latencies_s)
    setting = job.setting
    return {
        "policy": name,
        "trace": setting.trace,
        "fleet": job.setup.fleet,
        "level": job.level,
        "rate": setting.rate,
        "load": setting.load,
        "seed": job.seed,
        "slo_scale": setting.slo_scale,
        "slo_s": mean(sample.slos_s),
        "arrived": len(latencies_s),
        "finished": finished,
        "failed": len(latencies_s) - finished,
        "attainment": slo_attainment(latencies_s, sample.slos_s),
        "goodput": goodput(ended_s, [slo_s for _, slo_s in steady], end - begin),
        "throughput": throughput(ended_s, end - begin),
        "p50_s": percentile(latencies_s, 50.0),
        "p95_s": percentile(latencies_s, 95.0),
        "p99_s": percentile(latencies_s, 99.0),
        "mean_s": mean(latencies_s),
        "slo_scale_at_95": slo_scale_at(0.95, latencies_s, sample.references_s),
        "slo_scale_at_99": slo_scale_at(0.99, latencies_s, sample.references_s),
        "decision_us": sample.decision_us,
        "variant": job.variant.label or None,
        "fingerprint": job.variant.policy.fingerprint,
    }


DEFINITIONS: Mapping[str, str] = {
    "rate": "arrivals of runs per second",
    "load": "rate over the fleet's capacity; null where rates were given",
    "slo_s": "mean over the runs of what each was promised, end to end",
    "failed": "runs that never ended; they count as arrivals and miss every SLO",
    "attainment": "runs that ended within their SLO, over all arrivals",
    "throughput": "runs that ended between the arrival of the run at 10 % of the arrivals and the "
    "last arrival, over that time: neither filling up nor the tail after the last arrival counts",
    "goodput": "as throughput, runs within their SLO only",
    "p50_s, p95_s, p99_s, mean_s": "end-to-end latency over all arrivals; every simulation goes on "
    "until all runs have ended, so none is cut off; null if it is infinite because runs failed",
    "slo_scale_at_95, slo_scale_at_99": "smallest multiple of each run's LB1 (its critical path, "
    "alone on the fastest instance, prefixes cached) within which that share of all arrivals ended",
    "decision_us": "median of the real microseconds that one decision of the router took",
    "variant": "of a search, what was chosen in hindsight for this setting",
    "pairs": "ratio of `policy` to `against`, geometric mean over seeds with the same runs and "
    "arrivals; 95 % percentile-bootstrap interval over seeds; null where `against` is 0 or none",
}


def ratios(rows: Sequence[Row], others: Sequence[Row], metric: str) -> list[float] | None:
    """Return `rows` over `others` seed by seed; None if one cannot be said.

    Args:
        rows: Of one policy in one setting, one per seed.
        others: Of another policy, the same seeds.
        metric: Column.
    """
    by_seed = {row["seed"]: row[metric] for row in others}
    found = []
    for row in rows:
        above, below = row[metric], by_seed.get(row["seed"])
        if not _is_usable(above) or not _is_usable(below) or below == 0.0:
            return None
        found.append(above / below)
    return found or None


def pair(rows: Sequence[Row], others: Sequence[Row], metric: str) -> Row:
    """Return the pair of two policies in one setting; see `ratios`."""
    first, other = rows[0], others[0]
    found = ratios(rows, others, metric)
    low = high = ratio = None
    if found is not None:
        ratio = geometric_mean(found)
        low, high = interval(found)
    return {
        "policy": first["policy"],
        "against": other["policy"],
        "trace": first["trace"],
        "rate": first["rate"],
        "load": first["load"],
        "slo_scale": first["slo_scale"],
        "metric": metric,
        "ratio": ratio,
        "ci_low": low,
        "ci_high": high,
        "seeds": 0 if found is None else len(found),
    }


def geometric_mean(values: Sequence[float]) -> float:
    """Return it; 0 if any value is."""
    if any(value == 0.0 for value in values):
        return 0.0
    return math.exp(math.fsum(map(math.log, values)) / len(values))


def interval(values: Sequence[float], share: float = 0.95) -> tuple[float, float]:
    """Return the percentile-bootstrap interval of the geometric mean, the same every time."""
    with np.errstate(divide="ignore"):
        logs = np.log(np.asarray(values, dtype=float))
    draws = np.random.default_rng(_BOOTSTRAP_SEED).integers(
        len(logs), size=(NUM_RESAMPLES, len(logs))
    )
    means = np.exp(logs[draws].mean(axis=1))
    tail = 50.0 * (1.0 - share)
    low, high = np.percentile(means, [tail, 100.0 - tail])
    return float(low), float(high)


def _is_usable(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
