"""More runs than the fleet can serve in time."""

from __future__ import annotations

from dataclasses import replace

from tests.sim.builders import sim_instance, trace_call, trace_run
from vllm_workflow.core.config import PRESETS
from vllm_workflow.core.metrics import slo_attainment
from vllm_workflow.sim.arrivals import with_arrivals
from vllm_workflow.sim.bounds import critical_path_s
from vllm_workflow.sim.declare import declared
from vllm_workflow.sim.fleet import fleet_of
from vllm_workflow.sim.results import SimResult
from vllm_workflow.sim.simulator import simulate
from vllm_workflow.sim.types import TraceRun
from vllm_workflow.sim.workloads import load

DEFAULT = PRESETS["workflow"]
FLEET = [sim_instance()]


def runs(num_runs: int, *, every_s: float) -> list[TraceRun]:
    """Two calls each, in turn, promised six times what they take alone."""
    made = []
    for number in range(num_runs):
        run = trace_run(
            f"run-{number}",
            trace_call("a", prompt=2_000, output=100),
            trace_call("b", prompt=2_000, output=100, after=("a",)),
            arrival_s=number * every_s,
        )
        made.append(replace(run, slo_s=6.0 * critical_path_s(run, FLEET)))
    return made


def attainment(result: SimResult) -> float:
    found = slo_attainment(
        [run.latency_s for run in result.runs], [run.slo_s or 0.0 for run in result.runs]
    )
    assert found is not None
    return found


def overload() -> list[TraceRun]:
    """More than can end within their SLO."""
    alone_s = critical_path_s(runs(1, every_s=0.0)[0], FLEET)
    return runs(400, every_s=alone_s / 20)


def test_under_overload_more_runs_are_on_time_if_some_wait() -> None:
    waiting = simulate(overload(), FLEET, DEFAULT)
    beginning = simulate(overload(), FLEET, replace(DEFAULT, relegate=False))

    assert attainment(waiting) > attainment(beginning) + 0.1


def test_under_overload_all_runs_end() -> None:
    assert all(run.finished for run in simulate(overload(), FLEET, DEFAULT).runs)


def test_a_refused_run_arrived_and_never_ends() -> None:
    result = simulate(overload(), FLEET, replace(DEFAULT, admission="reject", max_hold_share=0.05))

    refused = {run.run_id for run in result.runs if not run.finished}
    assert len(result.runs) == 400
    assert 0 < len(refused) < 400
    assert not any(call.run_id in refused and call.end_time > 0.0 for call in result.calls)
    assert attainment(result) > 0.1


def test_with_time_enough_nothing_waits_to_begin() -> None:
    few = runs(60, every_s=critical_path_s(runs(1, every_s=0.0)[0], FLEET))

    waiting = simulate(few, FLEET, DEFAULT)
    beginning = simulate(few, FLEET, replace(DEFAULT, relegate=False))

    assert waiting.runs == beginning.runs


def test_slow_instances_that_get_few_calls_hold_no_run_back() -> None:
    fleet = fleet_of("A100:1,L4:3,A10G:2", model_shape="llama-3.1-8b", gpu_memory_utilization=0.95)
    trace = with_arrivals(load("builtin:chess", 80), 0.48)
    found = [replace(run, slo_s=5.0 * critical_path_s(run, fleet)) for run in trace.runs]
    workflows = declared(found)

    waiting = simulate(found, fleet, DEFAULT, workflows=workflows)
    beginning = simulate(found, fleet, replace(DEFAULT, relegate=False), workflows=workflows)

    assert attainment(beginning) > 0.95
    assert attainment(waiting) > attainment(beginning) - 0.02
