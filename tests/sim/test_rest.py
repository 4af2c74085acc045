"""True work left, as a clairvoyant policy is told."""

from __future__ import annotations

import pytest

from tests.sim.builders import sim_instance, trace_call, trace_run
from vllm_workflow.core.latency import LatencyModel
from vllm_workflow.sim.bounds import critical_path_s, rest_after_s
from vllm_workflow.sim.simulator import simulate
from vllm_workflow.sim.types import TraceCall, TraceRun

SLOW = LatencyModel(overhead_s=1.0, weights_s=0.0, per_token_s=0.0)  # a second per step
RUN = trace_run(
    "r",
    trace_call("a", output=2),
    trace_call("long", after=("a",), output=5),
    trace_call("short", after=("a",), output=1),
    trace_call("join", after=("long", "short"), gap_s=3.0, output=4),
)


def test_what_is_left_after_a_call_is_the_longest_path_behind_it() -> None:
    rests = rest_after_s(RUN, [sim_instance(latency=SLOW)])

    assert rests == {"join": 0.0, "long": 7.0, "short": 7.0, "a": 12.0}


def test_the_first_call_and_what_is_left_after_it_are_the_whole_run() -> None:
    fleet = [sim_instance(latency=SLOW)]

    assert critical_path_s(RUN, fleet) == pytest.approx(2.0 + rest_after_s(RUN, fleet)["a"])


def test_the_work_left_that_is_told_replaces_what_the_router_would_predict() -> None:
    told: list[str] = []

    def rest(run: TraceRun, call: TraceCall) -> float:
        told.append(call.call_id)
        return 1.0

    simulate([RUN], [sim_instance(latency=SLOW)], rest=rest)

    assert told == ["a", "long", "short", "join"]


def test_of_two_equal_deadlines_the_run_with_more_work_left_goes_first() -> None:
    # One seat. Both wait for `seated`; only what is told sets them apart.
    runs = [
        trace_run("seated", trace_call(output=20), slo_s=1000.0),
        trace_run("first", trace_call(output=3), arrival_s=1.5, slo_s=998.5),
        trace_run("second", trace_call(output=3), arrival_s=1.6, slo_s=998.4),
    ]
    fleet = [sim_instance(latency=SLOW, max_num_seqs=1)]

    told = simulate(runs, fleet, rest=lambda run, call: 50.0 if run.run_id == "second" else 0.0)
    untold = simulate(runs, fleet)

    assert told.runs[2].end_time < told.runs[1].end_time
    assert untold.runs[1].end_time < untold.runs[2].end_time
