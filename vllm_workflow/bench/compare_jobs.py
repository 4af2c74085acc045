"""One simulation of a comparison: described by values, so that any process can do it."""

from __future__ import annotations

import multiprocessing
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import lru_cache
from types import MappingProxyType
from typing import Protocol, TypeVar

from vllm_workflow.bench.disturbance import UNDISTURBED, Disturbance
from vllm_workflow.core.config import PolicyConfig
from vllm_workflow.core.errors import ConfigError
from vllm_workflow.core.workflow import WorkflowProfile
from vllm_workflow.sim.arrivals import arrival_times
from vllm_workflow.sim.bounds import critical_path_s, rest_after_s
from vllm_workflow.sim.capacity import Capacity, capacity
from vllm_workflow.sim.declare import declared
from vllm_workflow.sim.fleet import EngineFactory, SimInstance, event_engine, fleet_of
from vllm_workflow.sim.hints import LengthHint, RestHint, true_lengths
from vllm_workflow.sim.results import RunResult
from vllm_workflow.sim.rng import stream
from vllm_workflow.sim.simulator import simulate
from vllm_workflow.sim.types import Trace, TraceRun
from vllm_workflow.sim.workloads import PREFIX, load

NUM_CAPACITY_RUNS = 200
"""Runs that capacity is found with, whatever the number that is compared on."""
PROFILE_SEED = 1_000_003
"""Of the generated runs that the router's workflow profile is taken from: never compared on."""
NUM_PROFILE_RUNS = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What all simulations of a comparison share; see the flags of the same names."""

    fleet: str
    model_shape: str
    weight_bits: int
    tp: int
    gpu_memory_utilization: float
    num_runs: int
    burstiness: float
    disturbance: Disturbance = UNDISTURBED
    """What the router is wrong about."""

    def build_fleet(self) -> tuple[SimInstance, ...]:
        """Raises: ConfigError: See `fleet_of`; a disturbance of an unknown instance."""
        fleet = fleet_of(
            self.fleet,
            model_shape=self.model_shape,
            tp=self.tp,
            weight_bits=self.weight_bits,
            gpu_memory_utilization=self.gpu_memory_utilization,
        )
        return self.disturbance.fleet(fleet)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What policies are compared under, seed by seed."""

    trace: str
    rate: float
    """Runs per second."""
    load: float | None
    """The same as a fraction of the fleet's capacity; None where that was not asked."""
    slo_scale: float | None
    """Each run's SLO over its LB1; None with `slo_s`."""
    slo_s: float | None
    """One SLO for all runs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A policy, and what it is told."""

    policy: PolicyConfig
    label: str = ""
    """Of a search: which of its variants."""
    is_clairvoyant: bool = False
    """Told true output lengths, and the true critical path of what is left of each run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One policy on the runs and arrivals of one seed."""

    setup: Setup
    setting: Setting
    variant: Variant
    seed: int
    level: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What became of the runs of one job, in order of arrival, shape (n,) each."""

    arrivals: tuple[float, ...]
    latencies_s: tuple[float, ...]
    """`inf` for a run that did not end."""
    references_s: tuple[float, ...]
    """LB1 of each run."""
    slos_s: tuple[float, ...]
    decision_us: float | None
    """Median real microseconds of a decision."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What a level gives back."""

    runs: Sequence[RunResult]
    """One per run that arrived, in order of arrival."""
    decision_us: Sequence[float] = ()
    """Of each decision, if it was timed."""


class Measure(Protocol):
    """A level of fidelity: it runs a policy on a fleet, as real as it can.

    Equal arguments give equal runs where time is virtual.
    """

    def __call__(
        self,
        policy: PolicyConfig,
        runs: Sequence[TraceRun],
        arrivals: Sequence[float],
        fleet: Sequence[SimInstance],
        *,
        workflows: Sequence[WorkflowProfile],
        hint: LengthHint | None,
        rest: RestHint | None,
    ) -> Measured:
        """Run to the end of all runs.

        Args:
            policy: Of router and engines.
            runs: With their SLOs.
            arrivals: Seconds from the start, one per run, in order.
            fleet: At least one instance.
            workflows: Declared to the router.
            hint: True lengths, for a clairvoyant policy.
            rest: True work left, likewise.
        """
        ...


def _simulated(engines: Callable[[], EngineFactory]) -> Measure:
    def measure(
        policy: PolicyConfig,
        runs: Sequence[TraceRun],
        arrivals: Sequence[float],
        fleet: Sequence[SimInstance],
        *,
        workflows: Sequence[WorkflowProfile],
        hint: LengthHint | None,
        rest: RestHint | None,
    ) -> Measured:
        result = simulate(
            runs,
            fleet,
            policy,
            arrivals=arrivals,
            engines=engines(),
            workflows=workflows,
            hint=hint,
            rest=rest,
            time_decisions=True,
        )
        return Measured(runs=result.runs, decision_us=result.decision_us)

    return measure


def _vllm_engines() -> EngineFactory:
    try:
        from vllm_workflow.sim.vllm_engine import vllm_engine  # takes seconds
    except ModuleNotFoundError as e:
        if e.name is not None and e.name.startswith("vllm_workflow"):
            raise
        raise ConfigError(
            f"--level 2: expected vLLM to be installed, but Python package {e.name!r} is missing"
        ) from None
    return vllm_engine


LEVELS: Mapping[int, Measure] = MappingProxyType(
    {1: _simulated(lambda: event_engine), 2: _simulated(_vllm_engines)}
)
"""Level -> how a policy is run at it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What all policies get alike in one setting and seed."""

    runs: tuple[TraceRun, ...]
    """With their SLOs, in order of arrival."""
    arrivals: tuple[float, ...]
    references_s: tuple[float, ...]
    """LB1 of each run."""
    workflows: tuple[WorkflowProfile, ...]
    """Declared to the router."""


def inputs_of(setup: Setup, setting: Setting, seed: int) -> Inputs:
    """Return what is compared on; equal at every level.

    Raises:
        ConfigError: A call that fits no instance.
    """
    trace = seed_trace(setting.trace, setup.num_runs, seed)
    references_s = _references_s(setup, setting.trace, seed)
    promised = zip(trace.runs, slos_s(setting, references_s), strict=True)
    arrivals = arrival_times(
        len(trace.runs), request_rate=setting.rate, burstiness=setup.burstiness, seed=seed
    )
    return Inputs(
        runs=tuple(replace(run, slo_s=slo_s) for run, slo_s in promised),
        arrivals=tuple(arrivals),
        references_s=references_s,
        workflows=setup.disturbance.workflows(_workflows(setting.trace)),
    )


def run_job(job: Job) -> Sample:
    """Do one simulation.

    Raises:
        ConfigError: No such level, or a call that fits no instance.
    """
    variant = job.variant
    fleet = _fleet(job.setup)
    inputs = inputs_of(job.setup, job.setting, job.seed)
    measured = level_of(job.level)(
        variant.policy,
        inputs.runs,
        inputs.arrivals,
        fleet,
        workflows=inputs.workflows,
        hint=true_lengths if variant.is_clairvoyant else job.setup.disturbance.hint(job.seed),
        rest=_true_rest(inputs.runs, fleet) if variant.is_clairvoyant else None,
    )
    timed = measured.decision_us
    return Sample(
        arrivals=tuple(run.arrival_time for run in measured.runs),
        latencies_s=tuple(run.latency_s for run in measured.runs),
        references_s=inputs.references_s,
        slos_s=tuple(slos_s(job.setting, inputs.references_s)),
        decision_us=statistics.median(timed) if timed else None,
    )


def level_of(level: int) -> Measure:
    """Return how policies are run at a level.

    Raises:
        ConfigError: It is not available.
    """
    if level not in LEVELS:
        raise ConfigError(f"--level: level {level} is not available; levels are {sorted(LEVELS)}")
    return LEVELS[level]


def slos_s(setting: Setting, references_s: Sequence[float]) -> list[float]:
    """Return what is promised to each run."""
    if setting.slo_s is not None:
        return [setting.slo_s] * len(references_s)
    scale = setting.slo_scale or 1.0
    return [scale * reference_s for reference_s in references_s]


def find_capacity(setup: Setup, trace: str) -> Capacity:
    """Return what the fleet serves of a trace, found at level 1 whatever level is compared at.

    Nothing disturbs it, so that a load is the same rate whatever the router is wrong about.
    """
    setup = replace(setup, disturbance=UNDISTURBED)
    runs = seed_trace(trace, NUM_CAPACITY_RUNS, 0).runs
    return capacity(runs, _fleet(setup), workflows=_workflows(trace))


_Task = TypeVar("_Task")
_Result = TypeVar("_Result")


def in_processes(
    do: Callable[[_Task], _Result], tasks: Iterable[_Task], num_processes: int
) -> Iterator[tuple[_Task, _Result]]:
    """Yield each task with its result, as they come; the results depend on the tasks alone.

    Args:
        do: A function of a module.
        tasks: Values that can be sent to another process.
        num_processes: 1 does everything here, in order.
    """
    todo = list(tasks)
    if num_processes == 1 or len(todo) < 2:
        for task in todo:
            yield task, do(task)
        return
    context = multiprocessing.get_context("spawn")
    num_processes = min(num_processes, len(todo))
    with ProcessPoolExecutor(num_processes, mp_context=context) as pool:
        futures: dict[Future[_Result], _Task] = {pool.submit(do, task): task for task in todo}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


# What several jobs of one process need is made once.


@lru_cache(maxsize=4)
def _fleet(setup: Setup) -> tuple[SimInstance, ...]:
    return setup.build_fleet()


@lru_cache(maxsize=32)
def seed_trace(name: str, num_runs: int, seed: int) -> Trace:
    """Return the runs of one seed: generated with it, or of a file in an order drawn by it.

    Raises:
        ConfigError: See `load`.
    """
    if name.startswith(PREFIX):
        return load(name, num_runs, seed)
    trace = load(name)
    if num_runs > len(trace.runs):
        trace = load(name, num_runs, seed)
    runs = list(trace.runs)
    stream(seed, "order").shuffle(runs)
    note = f"{num_runs} of its runs, in an order drawn anew for each seed."
    return replace(trace, runs=tuple(runs[:num_runs]), notes=(*trace.notes, note))


@lru_cache(maxsize=8)
def _workflows(name: str) -> tuple[WorkflowProfile, ...]:
    if name.startswith(PREFIX):
        return declared(load(name, NUM_PROFILE_RUNS, PROFILE_SEED).runs)
    return declared(load(name).runs)


@lru_cache(maxsize=32)
def _references_s(setup: Setup, name: str, seed: int) -> tuple[float, ...]:
    fleet = _fleet(setup)
    return tuple(critical_path_s(run, fleet) for run in seed_trace(name, setup.num_runs, seed).runs)


def _true_rest(runs: Sequence[TraceRun], fleet: Sequence[SimInstance]) -> RestHint:
    rests = {run.run_id: rest_after_s(run, fleet) for run in runs}
    return lambda run, call: rests[run.run_id][call.call_id]
