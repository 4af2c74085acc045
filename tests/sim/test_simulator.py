"""Runs go from arrival to end as their edges say, through the router's dispatcher."""

from __future__ import annotations

from tests.sim.builders import sim_instance, trace_call, trace_run
from vllm_workflow.sim.simulator import simulate


def test_call_is_made_a_gap_after_the_last_of_those_before_it_ends() -> None:
    run = trace_run(
        "run",
        trace_call("a", output=5),
        trace_call("b", output=50),
        trace_call("c", after=("a", "b"), gap_s=0.25),
        arrival_s=1.0,
    )

    result = simulate([run], [sim_instance()])

    a, b, c = result.calls
    assert a.submit_time == b.submit_time == 1.0
    assert a.end_time < b.end_time
    assert c.submit_time == b.end_time + 0.25
    assert result.runs[0].end_time == c.end_time
