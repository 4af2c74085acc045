"""The same traffic on another fleet, at another rate, under other promises or another policy.

Both sides get the same runs, arrivals and order of runs, arrangement by arrangement
(`sim.replicates`), so that what differs is the change and not the draw.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from types import MappingProxyType

from vllm_workflow.core.config import PolicyConfig
from vllm_workflow.core.errors import ConfigError
from vllm_workflow.core.metrics import goodput, mean, percentile, slo_attainment
from vllm_workflow.core.tenants import TenantsConfig
from vllm_workflow.core.workflow import WorkflowProfile
from vllm_workflow.sim.fleet import SimInstance
from vllm_workflow.sim.replicates import Estimate, estimate, replicate
from vllm_workflow.sim.simulator import simulate
from vllm_workflow.sim.types import TraceRun

METRICS: Mapping[str, str] = MappingProxyType(
    {
        "attainment": "runs within their SLO, over all arrivals",
        "mean_s": "mean run latency, seconds",
        "p50_s": "median run latency, seconds",
        "p95_s": "95th percentile of run latency, seconds",
        "p99_s": "99th percentile of run latency, seconds",
        "goodput": "runs within their SLO per second, from the first arrival to the last end",
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """What is simulated."""

    runs: tuple[TraceRun, ...]
    """In order of arrival, each with its `arrival_s`."""
    fleet: tuple[SimInstance, ...]
    policy: PolicyConfig
    """Of router and engines."""
    workflows: tuple[WorkflowProfile, ...] = ()
    tenants: TenantsConfig | None = None
    """Their shares, quotas and SLOs; None: nobody asks whose a call is."""
    uncounted: frozenset[str] = frozenset()
    """Ids of runs that are load only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One metric now and then, over arrangements of the same traffic."""

    metric: str
    now: Estimate
    then: Estimate
    difference: Estimate
    """`then` − `now`, arrangement by arrangement."""


def compare(
    now: Scenario,
    then: Scenario,
    *,
    num_replicates: int = 5,
    seed: int = 0,
    confidence: float = 0.95,
) -> list[Comparison]:
    """Return what would change; a metric that cannot be said of either side is left out.

    Args:
        now: As it is.
        then: What if; of the same runs, though they may arrive faster or be promised other SLOs.
        num_replicates: Arrangements, at least 2; 0 is the traffic as it was.
        seed: Of the others.
        confidence: Of the intervals.

    Raises:
        ConfigError: A call that fits no instance, or fewer than two arrangements.
    """
    if num_replicates < 2:
        raise ConfigError(f"replicates: expected an integer from 2, got {num_replicates}")
    before = [_measured(now, number, seed) for number in range(num_replicates)]
    after = [_measured(then, number, seed) for number in range(num_replicates)]
    found = []
    for metric in METRICS:
        pairs = [(b[metric], a[metric]) for b, a in zip(before, after)]
        old = [b for b, a in pairs if _is_usable(b) and _is_usable(a)]
        new = [a for b, a in pairs if _is_usable(b) and _is_usable(a)]
        if len(old) == num_replicates:
            found.append(
                Comparison(
                    metric=metric,
                    now=estimate(old, confidence),
                    then=estimate(new, confidence),
                    difference=estimate([a - b for b, a in zip(old, new)], confidence),
                )
            )
    return found


def _measured(scenario: Scenario, number: int, seed: int) -> dict[str, float]:
    runs = replicate(scenario.runs, number, seed)
    result = simulate(
        runs,
        scenario.fleet,
        scenario.policy,
        workflows=scenario.workflows,
        tenants=scenario.tenants,
    )
    counted = [run for run in result.runs if run.run_id not in scenario.uncounted]
    latencies_s = [run.latency_s for run in counted]
    slos_s = [run.slo_s for run in counted]
    ends = [run.end_time for run in counted if run.finished]
    duration_s = max(ends, default=math.nan) - min((r.arrival_time for r in counted), default=0.0)
    has_slo = any(slo_s is not None for slo_s in slos_s)
    values = {
        "attainment": slo_attainment(latencies_s, slos_s),
        "mean_s": mean(latencies_s),
        **{f"p{p}_s": percentile(latencies_s, p) for p in (50, 95, 99)},
        "goodput": goodput(latencies_s, slos_s, duration_s) if has_slo else None,
    }
    return {name: math.nan if value is None else value for name, value in values.items()}


def _is_usable(value: float) -> bool:
    return math.isfinite(value)


def faster(runs: Sequence[TraceRun], scale: float) -> tuple[TraceRun, ...]:
    """Return the runs arriving `scale` times as fast, in the same pattern.

    Raises:
        ConfigError: A scale that is not above 0, or a run without arrival.
    """
    _check_scale("rate scale", scale)
    scaled = []
    for run in runs:
        if run.arrival_s is None:
            raise ConfigError(f"run {run.run_id!r}: expected an arrival, got none")
        scaled.append(replace(run, arrival_s=run.arrival_s / scale))
    return tuple(scaled)


def promised(runs: Sequence[TraceRun], scale: float) -> tuple[TraceRun, ...]:
    """Return the runs with `scale` times their SLOs.

    Raises:
        ConfigError: A scale that is not above 0, or no run has an SLO.
    """
    _check_scale("SLO scale", scale)
    if all(run.slo_s is None for run in runs):
        raise ConfigError("SLO scale: expected runs with an SLO, got none")
    return tuple(
        run if run.slo_s is None else replace(run, slo_s=scale * run.slo_s) for run in runs
    )


def added(fleet: Sequence[SimInstance], more: Sequence[SimInstance]) -> tuple[SimInstance, ...]:
    """Return the fleet with further instances, each named `GPU-NUMBER` as `fleet_of` does.

    Where a name is taken the number is the next that is free.
    """
    names = {each.instance.instance_id for each in fleet}
    found = list(fleet)
    for each in more:
        stem, _, number = each.instance.instance_id.rpartition("-")
        name = each.instance.instance_id
        for other in count(int(number) + 1):
            if name not in names:
                break
            name = f"{stem}-{other}"
        names.add(name)
        found.append(replace(each, instance=replace(each.instance, instance_id=name)))
    return tuple(found)


def removed(fleet: Sequence[SimInstance], what: str) -> tuple[SimInstance, ...]:
    """Return the fleet without some instances.

    Args:
        fleet: As it is.
        what: `ID`, or `GPU` or `GPU:COUNT` for the first so many whose name begins with it.

    Raises:
        ConfigError: There are not so many, or none would be left.
    """
    names = [each.instance.instance_id for each in fleet]
    if what in names:
        gone = {what}
    else:
        gpu, _, many = what.partition(":")
        if many and not (many.isascii() and many.isdigit() and int(many) > 0):
            raise ConfigError(
                f"remove: expected GPU:COUNT or the name of an instance, got {what!r}"
            )
        matching = [name for name in names if name.lower().startswith(gpu.lower())]
        number = int(many) if many else 1
        if not gpu or len(matching) < number:
            raise ConfigError(f"remove: expected {number} × {gpu!r} in the fleet, got {names}")
        gone = set(matching[:number])
    left = tuple(each for each in fleet if each.instance.instance_id not in gone)
    if not left:
        raise ConfigError(f"remove: expected an instance to be left, got none without {what!r}")
    return left


def _check_scale(name: str, scale: float) -> None:
    if not 0.0 < scale < math.inf:
        raise ConfigError(f"{name}: expected a finite number above 0, got {scale!r}")
