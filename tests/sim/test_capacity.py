"""What a fleet serves at most."""

from __future__ import annotations

import math

import pytest

from tests.sim.builders import sim_instance, trace_call, trace_run
from vllm_workflow.core.latency import LatencyModel
from vllm_workflow.sim.capacity import capacity, steady_throughput, steady_window
from vllm_workflow.sim.results import RunResult

# One token takes one second, whatever else is in the step.
SLOW = LatencyModel(overhead_s=1.0, weights_s=0.0, per_token_s=0.0)


def result(arrival_time: float, end_time: float) -> RunResult:
    return RunResult(
        run_id="r",
        workflow="w",
        tenant="",
        arrival_time=arrival_time,
        end_time=end_time,
        slo_s=None,
        num_calls=1,
    )


def test_a_fleet_serves_its_seats_over_the_time_of_a_call() -> None:
    # Ten steps for a call, and one more before its seat is seen to be free; two seats.
    runs = [trace_run(f"r{i}", trace_call(prompt=1, output=10)) for i in range(200)]

    found = capacity(runs, [sim_instance(latency=SLOW, max_num_seqs=2)])

    assert found.rate == pytest.approx(2 / 11.0, rel=0.06)


def test_twice_the_fleet_serves_twice_as_much() -> None:
    runs = [trace_run(f"r{i}", trace_call(prompt=1, output=10)) for i in range(200)]
    one = sim_instance("a", latency=SLOW, max_num_seqs=2)
    other = sim_instance("b", latency=SLOW, max_num_seqs=2)

    ratio = capacity(runs, [one, other]).rate / capacity(runs, [one]).rate

    assert ratio == pytest.approx(2.0, rel=0.1)


def test_throughput_counts_neither_filling_up_nor_the_tail() -> None:
    arrivals = [float(i) for i in range(11)]
    runs = [result(t, t + 0.5) for t in arrivals[:-1]] + [result(10.0, 1000.0)]

    assert steady_window(arrivals) == (1.0, 10.0)
    assert steady_throughput(runs) == pytest.approx(9 / 9.0)


def test_runs_that_come_all_at_once_have_no_throughput() -> None:
    assert steady_throughput([result(0.0, 1.0), result(0.0, 2.0)]) is None


def test_a_run_that_never_ends_is_not_served() -> None:
    runs = [result(float(i), math.nan) for i in range(3)]

    assert steady_throughput(runs) == 0.0
