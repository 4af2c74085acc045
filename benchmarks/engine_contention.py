"""What an engine's own decisions are worth where its seats or KV blocks run out.

    python -m benchmarks.engine_contention --level 2 --seeds 4

Each setting is a fleet, a mix of workflows with an SLO each, and a load; each policy runs on the
same runs and arrivals per seed. Printed are attainment, P95 over SLO, preemptions for an urgent
call, and prompt tokens computed twice; then each policy against the first, seed by seed.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from vllm_workflow.bench.compare_jobs import in_processes
from vllm_workflow.core.config import PolicyConfig
from vllm_workflow.core.metrics import mean, percentile
from vllm_workflow.sim.arrivals import arrival_times
from vllm_workflow.sim.bounds import critical_path_s
from vllm_workflow.sim.capacity import capacity
from vllm_workflow.sim.declare import declared
from vllm_workflow.sim.fleet import EngineFactory, SimInstance, build_fleet, event_engine, specs_of
from vllm_workflow.sim.rng import stream
from vllm_workflow.sim.simulator import simulate
from vllm_workflow.sim.types import SimEngine, TraceRun
from vllm_workflow.sim.workloads import load

PROFILE_SEED = 1_000_003
"""Of the runs that workflows are declared from: never compared on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Where policies are compared."""

    fleet: str
    workflows: tuple[tuple[str, float, int], ...]
    """(generator, SLO over the run's critical path alone, share of the runs)."""
    load: float
    """Of what the fleet serves at most."""
    max_num_seqs: int = 128
    num_kv_blocks: int | None = None


SETTINGS: Mapping[str, Case] = {
    "chess, 4 GPUs": Case(fleet="A100:2,A6000:1,L40S:1", workflows=(("chess", 4.0, 1),), load=1.0),
    "chess, little KV": Case(fleet="A6000:2", workflows=(("chess", 4.0, 1),), load=0.9),
    "chess, 16 seats": Case(
        fleet="A100:1", workflows=(("chess", 4.0, 1),), load=0.9, max_num_seqs=16
    ),
    "two SLOs, 16 seats": Case(
        fleet="A100:1",
        workflows=(("chess", 3.0, 1), ("chess-flat", 20.0, 1)),
        load=0.9,
        max_num_seqs=16,
    ),
    "two SLOs, little KV": Case(
        fleet="A6000:2", workflows=(("chess", 3.0, 1), ("chess-flat", 20.0, 1)), load=0.9
    ),
    "mixed": Case(fleet="A100:1", workflows=(("mac", 3.0, 3), ("reforce", 6.0, 1)), load=0.85),
    "mixed, 16 seats": Case(
        fleet="A100:1",
        workflows=(("mac", 3.0, 3), ("reforce", 6.0, 1)),
        load=0.85,
        max_num_seqs=16,
    ),
}
POLICIES: Mapping[str, PolicyConfig] = {
    "fcfs": PolicyConfig(ordering="fcfs", preempt=False),
    "slack, no preemption": PolicyConfig(preempt=False),
    "slack": PolicyConfig(),
    "late, no preemption": PolicyConfig(late_binding=True, preempt=False),
    "late": PolicyConfig(late_binding=True),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One policy, one setting, one seed; values, so that any process can do it."""

    setting: str
    policy: str
    config: PolicyConfig
    seed: int
    level: int
    num_runs: int
    rate: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What came of a task."""

    attainment: float
    p95_over_slo: float
    mean_over_slo: float
    num_preemptions: int
    num_wasted_tokens: int
    num_prompt_tokens: int


def fleet_of(case: Case) -> tuple[SimInstance, ...]:
    specs = specs_of(
        case.fleet, model_shape="llama-3.1-70b", weight_bits=4, gpu_memory_utilization=0.95
    )
    limits = {"max_num_seqs": case.max_num_seqs, "num_kv_blocks": case.num_kv_blocks}
    return build_fleet([replace(spec, **limits) for spec in specs])


def runs_of(case: Case, num_runs: int, seed: int) -> list[tuple[TraceRun, float]]:
    """Runs of all workflows in random order, each with its SLO over its critical path."""
    total = sum(share for *_, share in case.workflows)
    found: list[tuple[TraceRun, float]] = []
    for name, scale, share in case.workflows:
        runs = load(f"builtin:{name}", max(1, round(num_runs * share / total)), seed).runs
        found += [(replace(run, run_id=f"{name}-{run.run_id}"), scale) for run in runs]
    stream(seed, "mix").shuffle(found)
    return found


def run_task(task: Task) -> Row:
    """Do one simulation."""
    case = SETTINGS[task.setting]
    fleet = fleet_of(case)
    mix = runs_of(case, task.num_runs, task.seed)
    runs = [replace(run, slo_s=scale * critical_path_s(run, fleet)) for run, scale in mix]
    arrivals = arrival_times(len(runs), request_rate=task.rate, seed=task.seed)
    made: list[SimEngine] = []
    result = simulate(
        runs,
        fleet,
        task.config,
        arrivals=arrivals,
        engines=partial(_noted, _factory(task.level), made),
        workflows=declared(run for run, _ in runs_of(case, 200, PROFILE_SEED)),
    )
    over_slo = [run.latency_s / (run.slo_s or 1.0) for run in result.runs]
    num_new = sum(call.num_prompt_tokens - call.num_cached_tokens for call in result.calls)
    return Row(
        attainment=sum(ratio <= 1.0 for ratio in over_slo) / len(over_slo),
        p95_over_slo=percentile(over_slo, 95.0),
        mean_over_slo=mean(over_slo),
        num_preemptions=sum(engine.num_preempted_for_urgent for engine in made),  # type: ignore[attr-defined]
        num_wasted_tokens=sum(engine.num_prefill_tokens for engine in made) - num_new,  # type: ignore[attr-defined]
        num_prompt_tokens=num_new,
    )


def _factory(level: int) -> EngineFactory:
    if level == 1:
        return event_engine
    from vllm_workflow.sim.vllm_engine import vllm_engine  # takes seconds

    return vllm_engine


def _noted(
    factory: EngineFactory, made: list[SimEngine], instance: SimInstance, policy: PolicyConfig
) -> SimEngine:
    made.append(factory(instance, policy))
    return made[-1]


def rate_of(name: str) -> float:
    """Runs per second of a setting."""
    case = SETTINGS[name]
    runs = [run for run, _ in runs_of(case, 100, 0)]
    return case.load * capacity(runs, fleet_of(case)).rate


def tasks(
    names: Sequence[str], policies: Mapping[str, PolicyConfig], args: argparse.Namespace
) -> Iterator[Task]:
    for name in names:
        rate = rate_of(name)
        for policy, config in policies.items():
            for seed in range(args.seeds):
                yield Task(
                    setting=name,
                    policy=policy,
                    config=config,
                    seed=seed,
                    level=args.level,
                    num_runs=args.runs,
                    rate=rate,
                )


def show(done: Mapping[Task, Row]) -> None:
    for name in dict.fromkeys(task.setting for task in done):
        here = {task: row for task, row in done.items() if task.setting == name}
        first = next(iter(here)).policy
        print(f"\n{name}: {SETTINGS[name]}, {next(iter(here)).rate:.4f} runs/s")
        print(
            f"{'policy':28} {'within SLO':>15} {'P95/SLO':>13} {'preempted':>10} {'wasted':>8}"
            f" {'better/worse':>13}"
        )
        for policy in dict.fromkeys(task.policy for task in here):
            pairs = sorted((t.seed, row) for t, row in here.items() if t.policy == policy)
            rows = [row for _, row in pairs]
            base = {t.seed: row.attainment for t, row in here.items() if t.policy == first}
            gains = [row.attainment - base[seed] for seed, row in pairs]
            wasted = sum(r.num_wasted_tokens for r in rows) / sum(r.num_prompt_tokens for r in rows)
            print(
                f"{policy:28} {_cell([100 * r.attainment for r in rows])} %"
                f" {_cell([r.p95_over_slo for r in rows])}"
                f" {mean([r.num_preemptions for r in rows]):10.1f} {wasted:8.2%}"
                f" {sum(g > 0 for g in gains):6}/{sum(g < 0 for g in gains)}",
                flush=True,
            )


def _cell(values: Sequence[float]) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{mean(values):6.2f} ± {spread:4.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--level", type=int, choices=(1, 2), default=1)
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument(
        "--policy",
        nargs=2,
        action="append",
        metavar=("NAME", "JSON"),
        help="a policy by name and fields, e.g. 'slack' '{}'; repeatable (default: a selection)",
    )
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--jobs", type=int, default=1)
    args = parser.parse_args()
    policies = POLICIES
    if args.policy:
        policies = {
            name: PolicyConfig.from_mapping(json.loads(text), source=f"--policy {name}")
            for name, text in args.policy
        }
    todo = list(tasks(args.settings, policies, args))
    found = dict(in_processes(run_task, todo, args.jobs))
    show({task: found[task] for task in todo})


if __name__ == "__main__":
    main()
