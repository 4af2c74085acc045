"""What a flooding tenant costs the others, with and without a `tenants` section; and weights.

    python benchmarks/tenant_fairness.py
    python benchmarks/tenant_fairness.py --factors 5 --num-runs 40 --seeds 2 --jobs 2

Level 1. Three tenants of equal weight ask for the same share of `--load`. From a quarter of the
time on, one of them asks for `factor` times as much. Printed is the SLO attainment of the runs of
the two others, which are the same runs with the same arrivals in every row. Then two tenants of
weights 2 and 1 both ask for more than the fleet has, and the service they got is compared. Last,
three tenants of equal weight ask for the same, for each of `--loads` together, and the goodput of
all is printed, and its share of the best one found.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import yaml

from vllm_workflow.bench.compare_jobs import in_processes
from vllm_workflow.core import policy_names
from vllm_workflow.core.metrics import goodput, mean, slo_attainment
from vllm_workflow.core.tenants import TenantConfig, TenantsConfig
from vllm_workflow.core.workflow import WorkflowProfile
from vllm_workflow.sim.arrivals import arrival_times
from vllm_workflow.sim.bounds import call_s, with_slo_scale
from vllm_workflow.sim.capacity import capacity, steady_window
from vllm_workflow.sim.declare import declared
from vllm_workflow.sim.fleet import SimInstance, fleet_of
from vllm_workflow.sim.results import SimResult
from vllm_workflow.sim.simulator import simulate
from vllm_workflow.sim.types import TraceRun
from vllm_workflow.sim.workloads import load

QUIET = ("a", "b")
FLOOD = "flood"
PROFILE_SEED = 1_000_003
"""Of the runs that the workflow is declared from: never compared on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What all simulations share; see the flags."""

    trace: str
    fleet: str
    model_shape: str
    weight_bits: int
    policy: str
    load: float
    slo_scale: float
    num_runs: int
    capacity: float
    """Runs per second."""

    @property
    def rate(self) -> float:
        """Runs per second of each of the three tenants."""
        return self.load * self.capacity / 3.0

    @property
    def flood_begin(self) -> float:
        return 0.25 * self.num_runs / self.rate


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One simulation."""

    setup: Setup
    seed: int
    factor: float | None
    """None: the third tenant is not there; 1: it does not flood. Of `overload`: the load."""
    tenants: TenantsConfig | None


@lru_cache(maxsize=2)
def fleet(spec: str, model_shape: str, weight_bits: int) -> tuple[SimInstance, ...]:
    return fleet_of(
        spec, model_shape=model_shape, weight_bits=weight_bits, gpu_memory_utilization=0.95
    )


def fleet_in(setup: Setup) -> tuple[SimInstance, ...]:
    return fleet(setup.fleet, setup.model_shape, setup.weight_bits)


@lru_cache(maxsize=2)
def workflows(trace: str) -> tuple[WorkflowProfile, ...]:
    return declared(load(trace, 200, PROFILE_SEED).runs)


def runs_of(setup: Setup, tenant: str, seed: int, times: Sequence[float]) -> list[TraceRun]:
    made = load(setup.trace, len(times), seed).runs
    return [
        replace(run, run_id=f"{tenant}/{run.run_id}", tenant=tenant, arrival_s=time)
        for run, time in zip(with_slo_scale(made, setup.slo_scale, fleet_in(setup)), times)
    ]


def flood_runs(setup: Setup, seed: int, factor: float | None) -> list[TraceRun]:
    def times(number: int, num_runs: int, rate: float) -> list[float]:
        return arrival_times(num_runs, request_rate=rate, seed=10 * seed + number)

    runs: list[TraceRun] = []
    for number, tenant in enumerate(QUIET):
        arrivals = times(number, setup.num_runs, setup.rate)
        runs += runs_of(setup, tenant, 1000 * seed + number, arrivals)
    if factor is not None:
        begin, num_later = setup.flood_begin, round(0.75 * setup.num_runs * factor)
        arrivals = [t for t in times(2, setup.num_runs, setup.rate) if t < begin]
        arrivals += [begin + t for t in times(3, num_later, factor * setup.rate)]
        runs += runs_of(setup, FLOOD, 1000 * seed + 2, arrivals)
    return sorted(runs, key=lambda run: run.arrival_s or 0.0)


def simulated(
    setup: Setup, runs: Sequence[TraceRun], tenants: TenantsConfig | None, until_s: float
) -> SimResult:
    return simulate(
        runs,
        fleet_in(setup),
        policy_names.parse(setup.policy),
        workflows=workflows(setup.trace),
        tenants=tenants,
        until_s=until_s,
    )


def attained(result: SimResult, of: Iterable[str]) -> float | None:
    runs = [run for run in result.runs if run.tenant in of]
    return slo_attainment([run.latency_s for run in runs], [run.slo_s for run in runs])


def flood(job: Job) -> tuple[float | None, float | None]:
    """Return the attainment of the quiet tenants, and of the one that floods."""
    runs = flood_runs(job.setup, job.seed, job.factor)
    result = simulated(job.setup, runs, job.tenants, float("inf"))
    return attained(result, QUIET), attained(result, (FLOOD,))


def weights(job: Job) -> tuple[float | None, float | None]:
    """Return the service of a tenant of weight 2 over that of one of weight 1, both saturated."""
    setup, num_runs = job.setup, 3 * job.setup.num_runs
    runs: list[TraceRun] = []
    for number, tenant in enumerate(("two", "one")):
        rate = 1.5 * setup.capacity
        arrivals = arrival_times(num_runs, request_rate=rate, seed=10 * job.seed + number)
        runs += runs_of(setup, tenant, 1000 * job.seed + number, arrivals)
    runs.sort(key=lambda run: run.arrival_s or 0.0)
    end = num_runs / (1.5 * setup.capacity)
    result = simulated(setup, runs, job.tenants, end)
    calls = {(run.run_id, call.call_id): call for run in runs for call in run.calls}
    served = {"two": 0.0, "one": 0.0}
    for call in result.calls:
        if 0.2 * end < call.end_time <= end:
            costs = [
                call_s(calls[call.run_id, call.call_id], i.latency, i.block_size)
                for i in fleet_in(setup)
            ]
            served[call.run_id.partition("/")[0]] += sum(costs) / len(costs)
    return served["two"] / served["one"], None


def overload(job: Job) -> tuple[float | None, float | None]:
    """Return attainment and goodput of three equal tenants at `factor` times the capacity."""
    setup, times = job.setup, job.factor or 0.0
    runs: list[TraceRun] = []
    for number, tenant in enumerate((*QUIET, "c")):
        rate = times * setup.capacity / 3.0
        arrivals = arrival_times(setup.num_runs, request_rate=rate, seed=10 * job.seed + number)
        runs += runs_of(setup, tenant, 1000 * job.seed + number, arrivals)
    runs.sort(key=lambda run: run.arrival_s or 0.0)
    result = simulated(setup, runs, job.tenants, float("inf"))
    begin, end = steady_window([run.arrival_s or 0.0 for run in runs])
    steady = [run for run in result.runs if begin < run.end_time <= end]
    latencies_s = [run.latency_s for run in steady]
    return attained(result, (*QUIET, "c")), goodput(
        latencies_s, [run.slo_s for run in steady], end - begin
    )


def spread(values: Sequence[float | None]) -> str:
    found = [v for v in values if v is not None]
    if not found:
        return "none"
    return f"{mean(found):.3f} [{min(found):.3f}, {max(found):.3f}]"


def read_tenants(path: Path) -> TenantsConfig:
    text = path.read_text(encoding="utf-8")
    data = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    return TenantsConfig.from_mapping(data, source=str(path))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trace", default="builtin:chess", help="as `sim.workloads.load` takes it")
    parser.add_argument("--fleet", default="A100:2,A6000:1,L40S:1")
    parser.add_argument("--model-shape", default="llama-3.1-70b")
    parser.add_argument("--weight-bits", type=int, default=4)
    parser.add_argument("--policy", default="workflow")
    parser.add_argument("--load", type=float, default=0.85, help="of capacity, before the flood")
    parser.add_argument("--slo-scale", type=float, default=5.0, help="times the lower bound")
    parser.add_argument("--num-runs", type=int, default=60, help="of each quiet tenant")
    parser.add_argument("--factors", type=float, nargs="+", default=[5.0, 10.0])
    parser.add_argument(
        "--loads", type=float, nargs="*", default=[0.85, 1.0, 1.25, 1.5, 2.0], help="times capacity"
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--capacity", type=float, help="runs per second (default: found)")
    parser.add_argument("--tenants", type=Path, help="a `tenants` section (default: no quotas)")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    args = parser.parse_args()
    names = ("trace", "fleet", "model_shape", "weight_bits", "policy", "load", "slo_scale")
    setup = Setup(
        **{name: getattr(args, name) for name in names}, num_runs=args.num_runs, capacity=0.0
    )
    rate = (
        args.capacity
        or capacity(
            load(setup.trace, 200, 0).runs, fleet_in(setup), workflows=workflows(setup.trace)
        ).rate
    )
    setup = replace(setup, capacity=rate)
    fair = read_tenants(args.tenants) if args.tenants else TenantsConfig()
    print(
        f"level 1; {args.trace}, {args.num_runs} runs of each quiet tenant, {args.seeds} seeds; "
        f"{args.fleet} {args.model_shape} w{args.weight_bits}, capacity {rate:.4f} runs/s, load "
        f"{args.load:g}; SLO {args.slo_scale:g} × LB1; {args.policy}; lag {fair.lag:g}, credit "
        f"{fair.credit:g}; Python {platform.python_version()}; mean [least, most] over seeds"
    )
    print(f"{'flood':>8} {'tenants':>8}   {'attainment of the others':26} {'of the flooding one'}")
    cases = [(None, None)] + [(f, t) for f in (1.0, *args.factors) for t in (None, fair)]
    jobs = {
        case: [Job(setup=setup, seed=s, factor=case[0], tenants=case[1]) for s in range(args.seeds)]
        for case in cases
    }
    results = dict(in_processes(flood, [j for each in jobs.values() for j in each], args.jobs))
    for (factor, tenants), each in jobs.items():
        others, flooding = zip(*(results[job] for job in each))
        what = "alone" if factor is None else "none" if factor == 1.0 else f"× {factor:g}"
        section = "with" if tenants else "without"
        print(f"{what:>8} {section:>8}   {spread(others):26} {spread(flooding)}")
    two = replace(fair, named=(TenantConfig(name="two", weight=2.0), TenantConfig(name="one")))
    both = [Job(setup=setup, seed=s, factor=None, tenants=two) for s in range(args.seeds)]
    ratios = dict(in_processes(weights, both, args.jobs))
    print(f"service at weights 2 : 1, both saturated: {spread([ratios[j][0] for j in both])}")
    print_overload(setup, args.loads, fair, args.seeds, args.jobs)


def print_overload(
    setup: Setup, loads: Sequence[float], fair: TenantsConfig, num_seeds: int, num_processes: int
) -> None:
    cases = [(times, tenants) for times in loads for tenants in (None, fair)]
    jobs = {
        case: [Job(setup=setup, seed=s, factor=case[0], tenants=case[1]) for s in range(num_seeds)]
        for case in cases
    }
    each = dict(in_processes(overload, [j for of in jobs.values() for j in of], num_processes))
    goodputs = {case: mean([each[job][1] or 0.0 for job in of]) or 0.0 for case, of in jobs.items()}
    best = max(goodputs.values(), default=0.0)
    for (times, tenants), of in jobs.items():
        section = "with" if tenants else "without"
        value = goodputs[times, tenants]
        print(
            f"load {times:4g} {section:>8}   {spread([each[job][0] for job in of]):26} "
            f"goodput {value:.3f} runs/s, {value / best:.0%} of the best"
        )


if __name__ == "__main__":
    main()
