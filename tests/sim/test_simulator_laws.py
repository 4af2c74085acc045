"""What holds for every trace, fleet and policy."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.sim.builders import trace_call, trace_run
from tests.sim.strategies import fleets, policies, runs
from vllm_workflow.core.call_events import Submitted
from vllm_workflow.core.config import PolicyConfig
from vllm_workflow.core.events import Event
from vllm_workflow.sim.bounds import call_s, critical_path_s
from vllm_workflow.sim.engine import EventEngine
from vllm_workflow.sim.fleet import SimInstance
from vllm_workflow.sim.simulator import Outage, simulate
from vllm_workflow.sim.types import EngineEvent, SimEngine, TraceRun

laws = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


class Watched(EventEngine):
    """Looks at itself after everything that is done with it."""

    def advance(self, now: float) -> list[EngineEvent]:
        events = super().advance(now)
        self.check()
        return events

    def check(self) -> None:
        assert 0 <= self.pool.num_free <= self.pool.num_blocks
        assert bool(self.num_running) == (self.next_event_time() < math.inf)
        assert self.num_running or not self.num_waiting


def watched(made: list[Watched]) -> object:
    def make(instance: SimInstance, policy: PolicyConfig) -> SimEngine:
        made.append(
            Watched(
                instance.instance.instance_id,
                instance.latency,
                config=policy,
                max_num_seqs=instance.instance.max_num_seqs,
                num_kv_blocks=instance.num_kv_blocks,
                block_size=instance.block_size,
            )
        )
        return made[-1]

    return make


@laws
@given(runs(), fleets(), policies)
def test_every_call_is_made_once_and_ends_once(
    runs: list[TraceRun], fleet: list[SimInstance], policy: PolicyConfig
) -> None:
    result = simulate(runs, fleet, policy)

    made = sorted((c.run_id, c.call_id) for c in result.calls)
    assert made == sorted((r.run_id, c.call_id) for r in runs for c in r.calls)
    assert all(c.submit_time < c.first_token_time <= c.end_time < math.inf for c in result.calls)
    assert all(r.finished for r in result.runs)


@laws
@given(runs(), fleets(), policies)
def test_no_call_before_its_parents_and_no_token_before_its_prefill(
    runs: list[TraceRun], fleet: list[SimInstance], policy: PolicyConfig
) -> None:
    result = simulate(runs, fleet, policy)

    call_of = {(r.run_id, c.call_id): c for r in runs for c in r.calls}
    ends = {(c.run_id, c.call_id): c.end_time for c in result.calls}
    arrivals = {r.run_id: r.arrival_s for r in runs}
    latency_of = {i.instance.instance_id: i for i in fleet}
    for made in result.calls:
        call = call_of[made.run_id, made.call_id]
        parents = [ends[made.run_id, before] for before in call.after]
        start = max(parents, default=arrivals[made.run_id])
        assert made.submit_time == pytest.approx(start + call.gap_s, abs=1e-9)
        instance = latency_of[made.instance_id]
        first_s = call_s(replace(call, num_output_tokens=1), instance.latency, instance.block_size)
        assert made.first_token_time - made.submit_time >= first_s * (1 - 1e-9)


@laws
@given(runs(), fleets(), policies)
def test_no_run_beats_its_lower_bound(
    runs: list[TraceRun], fleet: list[SimInstance], policy: PolicyConfig
) -> None:
    result = simulate(runs, fleet, policy)

    bounds = {run.run_id: critical_path_s(run, fleet) for run in runs}
    assert all(r.latency_s >= bounds[r.run_id] * (1 - 1e-9) for r in result.runs)


@laws
@given(runs(), fleets(), policies)
def test_same_arguments_give_the_same_result(
    runs: list[TraceRun], fleet: list[SimInstance], policy: PolicyConfig
) -> None:
    assert simulate(runs, fleet, policy) == simulate(runs, fleet, policy)


@laws
@given(runs(), fleets(), policies)
def test_engines_are_never_idle_with_work_nor_over_full_and_end_empty(
    runs: list[TraceRun], fleet: list[SimInstance], policy: PolicyConfig
) -> None:
    made: list[Watched] = []

    simulate(runs, fleet, policy, engines=watched(made))

    assert all(engine.pool.num_free == engine.pool.num_blocks for engine in made)
    assert all(engine.next_event_time() == math.inf for engine in made)


@laws
@given(runs(), fleets(), policies, st.data())
def test_decisions_are_the_same_until_a_length_shows(
    runs: list[TraceRun], fleet: list[SimInstance], policy: PolicyConfig, data: st.DataObject
) -> None:
    # A run long after all others, so that what clients bound their answers by stays the same.
    stages = ("generate", "revise", "evaluate")
    last = [trace_call(stage, stage=stage, output=200) for stage in stages]
    runs = [*runs, trace_run("last", *last, arrival_s=1e5)]
    run = data.draw(st.integers(0, len(runs) - 2))
    call = data.draw(st.integers(0, len(runs[run].calls) - 1))
    num_output_tokens = data.draw(st.integers(1, 200))
    changed = list(runs)
    calls = list(runs[run].calls)
    calls[call] = replace(calls[call], num_output_tokens=num_output_tokens)
    changed[run] = replace(runs[run], calls=tuple(calls))

    one, other = decisions(runs, fleet, policy), decisions(changed, fleet, policy)

    shown = min(
        c.end_time
        for result, _ in (one, other)
        for c in result.calls
        if (c.run_id, c.call_id) == (runs[run].run_id, calls[call].call_id)
    )
    before = [[d for d in made if d.now < shown] for _, made in (one, other)]
    assert before[0] == before[1]


def decisions(
    runs: list[TraceRun], fleet: list[SimInstance], policy: PolicyConfig
) -> tuple[object, list[Submitted]]:
    log: list[Event] = []
    result = simulate(runs, fleet, policy, record=log.append)
    return result, [event for event in log if isinstance(event, Submitted)]


@laws
@given(runs(), fleets(), policies, st.floats(0.0, 3.0), st.floats(0.01, 2.0))
def test_outage_delays_runs_and_loses_none(
    runs: list[TraceRun],
    fleet: list[SimInstance],
    policy: PolicyConfig,
    start_s: float,
    lasts_s: float,
) -> None:
    outage = Outage(instance_id="i0", start_s=start_s, end_s=start_s + lasts_s)

    result = simulate(runs, fleet, policy, outages=[outage])

    assert all(r.finished for r in result.runs)
    on_it = [c for c in result.calls if c.instance_id == "i0"]
    # What ended on the instance ended before it went, or began after it was back.
    assert all(c.end_time <= start_s or c.first_token_time > start_s + lasts_s for c in on_it)
