"""How many runs per second a fleet serves at most: what loads are fractions of."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from vllm_workflow.core.metrics import throughput
from vllm_workflow.core.policy_names import parse
from vllm_workflow.core.workflow import WorkflowProfile
from vllm_workflow.sim.arrivals import arrival_times
from vllm_workflow.sim.bounds import call_s
from vllm_workflow.sim.fleet import EngineFactory, SimInstance, event_engine
from vllm_workflow.sim.results import RunResult
from vllm_workflow.sim.simulator import simulate
from vllm_workflow.sim.types import TraceRun

REFERENCE_POLICIES = ("least-outstanding+fcfs", "predicted-finish+fcfs")
"""One that knows nothing and one that predicts, both first come, first served."""
RAMP_SHARE = 0.1
"""Of the arrivals, what fills the fleet before throughput counts."""
STEP = 1.2
"""One rate over the one before."""
MAX_FALLING = 2
"""Rates in a row without a new highest throughput, after which a policy is done."""
MAX_RATES = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """What a fleet serves of one kind of runs."""

    rate: float
    """Runs per second."""
    policy: str
    """Which of the reference policies reached it."""
    measured: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    """Policy -> (arrivals, throughput), runs per second each."""


def capacity(
    runs: Sequence[TraceRun],
    fleet: Sequence[SimInstance],
    *,
    engines: EngineFactory = event_engine,
    workflows: Iterable[WorkflowProfile] = (),
) -> Capacity:
    """Return the highest throughput at any arrival rate under any of `REFERENCE_POLICIES`.

    Runs arrive evenly, first as slowly as if calls were served one at a time, then faster and
    faster until throughput falls: too many runs at once evict each other's prefixes from the
    KV caches, so that a fleet flooded with all runs at once is slower than at its best. The
    policies that are compared have no say in it.

    Args:
        runs: At least 20; more make it more precise.
        fleet: At least one instance.
        engines: Level of the simulation.
        workflows: Declared to the router.
    """
    declared = tuple(workflows)
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in REFERENCE_POLICIES}
    for name, found in measured.items():
        policy, best, num_falling = parse(name), 0.0, 0
        for rate in _rates(runs, fleet):
            arrivals = arrival_times(len(runs), request_rate=rate, burstiness=math.inf)
            result = simulate(
                runs, fleet, policy, arrivals=arrivals, engines=engines, workflows=declared
            )
            served = steady_throughput(result.runs) or 0.0
            found.append((rate, served))
            num_falling = 0 if served > best else num_falling + 1
            best = max(best, served)
            if num_falling == MAX_FALLING:
                break
    rates = {name: max(served for _, served in found) for name, found in measured.items()}
    fastest = max(rates, key=rates.__getitem__)
    return Capacity(rate=rates[fastest], policy=fastest, measured=measured)


def steady_window(arrivals: Sequence[float]) -> tuple[float, float]:
    """Return from when to when throughput counts: arrivals go on, and the fleet is full.

    From the arrival of the run at `RAMP_SHARE` to the last arrival. What comes before is
    filling up, what comes after is draining, whose long tail says nothing about throughput.

    Args:
        arrivals: Instants in order, at least one.
    """
    return arrivals[int(RAMP_SHARE * (len(arrivals) - 1))], arrivals[-1]


def steady_throughput(runs: Sequence[RunResult]) -> float | None:
    """Return the runs per second that end within the `steady_window` of their arrivals.

    None where the window has no length, as for runs that arrive all at once.
    """
    begin, end = steady_window([run.arrival_time for run in runs])
    ended = [run.latency_s for run in runs if begin < run.end_time <= end]
    return throughput(ended, end - begin)


def _rates(runs: Sequence[TraceRun], fleet: Sequence[SimInstance]) -> Iterator[float]:
    """Rates to try, from what the fleet would serve call by call."""
    rate = 0.0
    for each in fleet:
        work_s = sum(
            call_s(call, each.latency, each.block_size) for run in runs for call in run.calls
        )
        rate += len(runs) / work_s
    for _ in range(MAX_RATES):
        yield rate
        rate *= STEP
