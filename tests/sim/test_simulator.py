"""Runs go from arrival to end as their edges say, through the router's dispatcher."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.sim.builders import LATENCY, parts, sim_instance, trace_call, trace_run
from vllm_workflow.core.call_events import Submitted
from vllm_workflow.core.config import PolicyConfig
from vllm_workflow.core.errors import ConfigError
from vllm_workflow.core.events import Event
from vllm_workflow.core.types import StageRequest
from vllm_workflow.core.workflow import StageProfile, WorkflowProfile
from vllm_workflow.sim.bounds import call_s, critical_path_s, with_slo_scale
from vllm_workflow.sim.engine import EventEngine
from vllm_workflow.sim.fleet import SimInstance
from vllm_workflow.sim.simulator import Outage, simulate
from vllm_workflow.sim.types import EngineRequest, SimEngine

SLOWER = replace(LATENCY, overhead_s=10 * LATENCY.overhead_s, weights_s=10 * LATENCY.weights_s)


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


def test_arrivals_stand_in_for_those_of_the_trace() -> None:
    runs = [trace_run("x", arrival_s=None), trace_run("y", arrival_s=None)]

    result = simulate(runs, [sim_instance()], arrivals=[5.0, 2.0])

    assert [(r.run_id, r.arrival_time) for r in result.runs] == [("y", 2.0), ("x", 5.0)]


def test_alone_a_call_takes_what_its_bound_says() -> None:
    prompt = LATENCY.max_num_batched_tokens * 2
    run = trace_run("run", trace_call(prompt=prompt, output=100))

    result = simulate([run], [sim_instance()])

    bound = call_s(run.calls[0], LATENCY, 16)
    assert result.runs[0].latency_s == pytest.approx(bound, rel=1e-9)


def test_shared_prefix_is_computed_once() -> None:
    template = parts(("template", 1600))
    calls = [
        trace_call("a", prompt=1700, prefix=template),
        trace_call("b", prompt=1700, prefix=template, after=("a",)),
    ]

    first, second = simulate([trace_run("run", *calls)], [sim_instance()]).calls

    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 1600)
    assert second.end_time - second.submit_time < first.end_time - first.submit_time


class Spy(EventEngine):
    told: list[EngineRequest]

    def submit(self, request: EngineRequest, now: float) -> None:
        self.told.append(request)
        super().submit(request, now)


def spying(told: list[EngineRequest]) -> Callable[[SimInstance, PolicyConfig], SimEngine]:
    def make(instance: SimInstance, policy: PolicyConfig) -> SimEngine:
        engine = Spy(instance.instance.instance_id, instance.latency, config=policy)
        engine.told = told
        return engine

    return make


def test_engine_is_told_what_the_router_would_send_and_nothing_else() -> None:
    told: list[EngineRequest] = []
    workflow = WorkflowProfile(
        name="text2sql", stages=(StageProfile(name="generate"), StageProfile(name="revise"))
    )
    calls = trace_call(prompt=333, output=7), trace_call("d", stage="revise", after=("c",))
    run = trace_run("run", *calls, arrival_s=2.0, slo_s=1.23456)

    simulate([run], [sim_instance()], engines=spying(told), workflows=[workflow])

    call = told[0]
    assert call.request.deadline == 2.0 + 1.235  # whole milliseconds travel
    assert call.request.run_arrival_time == 2.0
    assert call.request.rest_s > 0.0
    assert call.request.service_s > 0.0
    known = StageRequest(
        request_id="run/c",
        arrival_time=2.0,
        workflow_id="run",
        workflow="text2sql",
        stage="generate",
        deadline=call.request.deadline,
        run_arrival_time=2.0,
        rest_s=call.request.rest_s,
        service_s=call.request.service_s,
        num_prompt_tokens=333,
    )
    assert call.request == known


def submitted(log: list[Event]) -> list[StageRequest]:
    return [event.request for event in log if isinstance(event, Submitted)]


def test_last_call_is_announced_only_if_its_stage_says_so() -> None:
    loop = [
        trace_call("a", stage="revise"),
        trace_call("b", stage="revise", after=("a",)),
    ]
    log: list[Event] = []

    simulate([trace_run("loop", *loop)], [sim_instance()], record=log.append)
    simulate([trace_run("once", loop[0])], [sim_instance()], record=log.append)

    assert [request.final for request in submitted(log)] == [False, False, True]


def test_client_may_announce_lengths_right_or_wrong() -> None:
    log: list[Event] = []

    simulate(
        [trace_run("run", trace_call(output=40))],
        [sim_instance()],
        record=log.append,
        hint=lambda run, call: 3.0 * call.num_output_tokens,
    )

    assert [request.expected_output_tokens for request in submitted(log)] == [120.0]


def test_router_may_be_wrong_about_an_instance() -> None:
    run = trace_run("run")

    believed = simulate([run], [sim_instance(latency=LATENCY)])
    wrong = simulate([run], [sim_instance(latency=LATENCY, actual=SLOWER)])
    right = simulate([run], [sim_instance(latency=SLOWER)])

    assert wrong.runs[0].latency_s == right.runs[0].latency_s > believed.runs[0].latency_s


def test_lost_call_is_made_again_elsewhere() -> None:
    fleet = [sim_instance("fast"), sim_instance("slow", latency=SLOWER)]
    run = trace_run("run", trace_call(output=100))

    result = simulate([run], fleet, outages=[Outage(instance_id="fast", start_s=0.5)])

    (call,) = result.calls
    assert (call.instance_id, call.num_attempts, call.sent_time) == ("slow", 2, 0.5)
    assert result.runs[0].finished


def test_run_that_nobody_can_serve_does_not_finish() -> None:
    result = simulate(
        [trace_run("run")], [sim_instance("a")], outages=[Outage(instance_id="a", start_s=0.0)]
    )

    (run,) = result.runs
    assert not run.finished
    assert run.latency_s == math.inf
    assert [c.instance_id for c in result.calls] == [""]


def test_simulation_stops_where_told_to() -> None:
    runs = [trace_run("x", arrival_s=0.0), trace_run("y", arrival_s=50.0)]

    result = simulate(runs, [sim_instance()], until_s=50.001)

    assert [r.finished for r in result.runs] == [True, False]


def test_decisions_are_timed_on_request_only() -> None:
    run = trace_run("run")

    assert simulate([run], [sim_instance()]).decision_us == ()
    assert len(simulate([run], [sim_instance()], time_decisions=True).decision_us) == 1


def test_slo_is_a_multiple_of_the_critical_path() -> None:
    run = trace_run(
        "run",
        trace_call("a", output=5),
        trace_call("b", output=50),
        trace_call("c", after=("a", "b"), gap_s=0.25),
    )
    fleet = [sim_instance("fast"), sim_instance("slow", latency=SLOWER)]
    b, c = (call_s(call, LATENCY, 16) for call in run.calls[1:])

    assert critical_path_s(run, fleet) == pytest.approx(b + 0.25 + c, rel=1e-12)
    assert with_slo_scale([run], 3.0, fleet)[0].slo_s == pytest.approx(3 * (b + 0.25 + c))


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        (lambda: simulate([trace_run(arrival_s=None)], [sim_instance()]), "expected an arrival"),
        (lambda: simulate([trace_run(arrival_s=-1.0)], [sim_instance()]), "expected an arrival"),
        (lambda: simulate([trace_run()], [sim_instance()], arrivals=[]), "one per run, 1, got 0"),
        (lambda: simulate([trace_run(), trace_run()], [sim_instance()]), "each run_id once"),
        (lambda: simulate([trace_run()], []), "at least one instance"),
        (lambda: simulate([trace_run()], [sim_instance(), sim_instance()]), "'a' is there twice"),
        (
            lambda: simulate(
                [trace_run()], [sim_instance()], outages=[Outage(instance_id="b", start_s=1.0)]
            ),
            r"expected one of \['a'\], got 'b'",
        ),
    ],
)
def test_what_cannot_be_simulated_is_an_error(wrong: Callable[[], object], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        wrong()
