"""A router's decision log as a trace."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from tests.builders import candidate, stage_request
from vllm_workflow.bench.analysis_sharing import sharing
from vllm_workflow.core.call_events import Polled, Settled, Submitted, Withdrawn
from vllm_workflow.core.config import PolicyConfig
from vllm_workflow.core.dispatcher import Dispatcher
from vllm_workflow.core.errors import ConfigError
from vllm_workflow.core.events import Event, Started, to_json
from vllm_workflow.core.fleet import Fleet, Instance
from vllm_workflow.core.prefix import Chain, Segment
from vllm_workflow.core.types import Decision, Outcome
from vllm_workflow.router.store import Store
from vllm_workflow.sim.arrivals import with_arrivals
from vllm_workflow.sim.fleet import InstanceSpec, build_fleet
from vllm_workflow.sim.simulator import simulate
from vllm_workflow.sim.trace import read_trace
from vllm_workflow.sim.types import PrefixPart, Trace, TraceRun
from vllm_workflow.sim.workloads import load

STARTED = Started(policy=PolicyConfig(), fingerprint="f")


def submitted(
    request_id: str,
    arrival: float,
    *,
    run: str = "run",
    stage: str = "s",
    queue_s: float = 0.0,
    deadline: float = math.inf,
    tenant: str = "",
    run_arrival: float = math.nan,
    prefix: Chain = (),
) -> Submitted:
    request = stage_request(
        request_id, arrival_time=arrival, deadline=deadline, stage=stage
    )._replace(
        workflow_id=run,
        tenant_id=tenant,
        run_arrival_time=run_arrival,
        prefix=prefix,
    )
    chosen = candidate("i")
    decision = Decision(request_id=request_id, chosen=chosen, cost=1.0, candidates=(chosen,))
    return Submitted(
        now=arrival + queue_s, request=request, num_prompt_bytes=1, exclude=(), decision=decision
    )


def settled(
    request_id: str,
    e2el_s: float = 1.0,
    *,
    ok: bool = True,
    num_prompt_tokens: int | None = 50,
    num_output_tokens: int | None = 7,
) -> Settled:
    return Settled(
        outcome=Outcome(
            request_id=request_id,
            instance_id="i",
            ok=ok,
            e2el_s=e2el_s,
            num_prompt_tokens=num_prompt_tokens,
            num_output_tokens=num_output_tokens,
        )
    )


def log(tmp_path: Path, *events: Event, cut: str = "") -> Path:
    path = tmp_path / "decisions.jsonl"
    path.write_text("".join(f"{to_json(event)}\n" for event in events) + cut, encoding="utf-8")
    return path


def test_a_call_follows_what_had_ended_when_it_arrived(tmp_path: Path) -> None:
    path = log(
        tmp_path,
        STARTED,
        submitted("a", 10.0),
        settled("a", 2.0),  # until 12
        submitted("b", 12.5),
        submitted("c", 12.5, queue_s=0.5),
        settled("b", 1.0),  # until 13.5
        settled("c", 1.5),  # until 14.5
        submitted("d", 15.0),
        settled("d"),
    )

    (run,) = read_trace(path).runs

    assert run.run_id == "run"
    assert run.arrival_s == 0.0
    assert [c.after for c in run.calls] == [
        (),
        ("call-1",),
        ("call-1",),
        ("call-2", "call-3"),
    ]
    assert [c.gap_s for c in run.calls] == [0.0, 0.5, 0.5, 0.5]
    assert (run.calls[0].num_prompt_tokens, run.calls[0].num_output_tokens) == (50, 7)


def test_a_call_does_not_follow_one_that_was_still_running(tmp_path: Path) -> None:
    events = [submitted("a", 0.0), submitted("b", 1.0), settled("a", 5.0), settled("b", 1.0)]

    (run,) = read_trace(log(tmp_path, STARTED, *events)).runs

    assert [c.after for c in run.calls] == [(), ()]
    assert run.calls[1].gap_s == 1.0


def test_runs_are_told_apart_by_tenant_and_come_by_arrival(tmp_path: Path) -> None:
    events = [
        submitted("a", 5.0, tenant="x"),
        submitted("b", 4.0, tenant="y"),
        submitted("c", 6.0, run=""),
        *map(settled, "abc"),
    ]

    runs = read_trace(log(tmp_path, STARTED, *events)).runs

    assert [(r.run_id, r.tenant, r.arrival_s) for r in runs] == [
        ("run", "y", 0.0),
        ("run~2", "x", 1.0),
        ("c", "", 2.0),
    ]


def test_a_deadline_becomes_the_promise_of_the_run(tmp_path: Path) -> None:
    events = [submitted("a", 5.0, deadline=14.0, run_arrival=4.0), settled("a")]

    (run,) = read_trace(log(tmp_path, STARTED, *events)).runs

    assert run.slo_s == 10.0
    assert run.calls[0].gap_s == 1.0


def test_a_deadline_in_another_age_is_none(tmp_path: Path) -> None:
    events = [submitted("a", 5.0, deadline=1e14), settled("a")]

    assert read_trace(log(tmp_path, STARTED, *events)).runs[0].slo_s is None


def test_a_log_of_many_lifetimes_is_refused(tmp_path: Path) -> None:
    life = [STARTED, submitted("a", 0.0), settled("a", 0.9e9)]

    with pytest.raises(ConfigError, match="expected runs within"):
        read_trace(log(tmp_path, *life, *life, *life))


def test_calls_that_failed_are_left_out_and_counted(tmp_path: Path) -> None:
    events = [
        submitted("a", 0.0),
        settled("a"),
        submitted("b", 1.0),
        settled("b", ok=False),
        submitted("c", 2.0),
    ]

    trace = read_trace(log(tmp_path, STARTED, *events))

    assert len(trace.runs[0].calls) == 1
    assert "2 calls did not end well and are left out." in trace.notes


def test_a_call_that_failed_over_counts_once_from_its_arrival(tmp_path: Path) -> None:
    events = [
        submitted("a", 0.0),
        settled("a", ok=False),
        submitted("a", 0.0, queue_s=3.0),
        settled("a", 1.0),
        submitted("b", 4.5),
        settled("b"),
    ]

    (run,) = read_trace(log(tmp_path, STARTED, *events)).runs

    assert [c.gap_s for c in run.calls] == [0.0, 0.5]


def test_without_usage_the_prediction_stands_in(tmp_path: Path) -> None:
    events = [submitted("a", 0.0), settled("a", num_prompt_tokens=None, num_output_tokens=None)]

    trace = read_trace(log(tmp_path, STARTED, *events))

    call = trace.runs[0].calls[0]
    assert (call.num_prompt_tokens, call.num_output_tokens) == (100, 10)
    assert any("1 answers had no usage" in note for note in trace.notes)


def test_a_restarted_router_goes_on_where_the_last_one_ended(tmp_path: Path) -> None:
    events = [
        STARTED,
        submitted("a", 100.0),
        settled("a", 2.0),
        STARTED,
        submitted("a", 3.0),
        settled("a", 1.0),
    ]

    trace = read_trace(log(tmp_path, *events))

    assert [(r.run_id, r.arrival_s) for r in trace.runs] == [("run", 0.0), ("run~2", 2.0)]
    assert any("started 2 times" in note for note in trace.notes)


def test_what_prompts_share_is_in_the_log(tmp_path: Path) -> None:
    shared, own = Segment(chain_hash=255, num_tokens=16), Segment(chain_hash=-2, num_tokens=9)
    events = [
        submitted("a", 0.0, prefix=(shared, own)),
        settled("a", num_prompt_tokens=30),
        submitted("b", 1.0, prefix=(shared._replace(num_tokens=17), own)),  # predicted anew
        settled("b", num_prompt_tokens=20),
    ]

    (run,) = read_trace(log(tmp_path, STARTED, *events)).runs

    head = PrefixPart(part_id="part/ff", num_tokens=16)
    assert run.calls[0].prefix == (head, PrefixPart(part_id="part/-2", num_tokens=9))
    assert run.calls[1].prefix == (head,)


def test_a_call_that_waited_in_the_router_ends_from_when_it_was_forwarded(tmp_path: Path) -> None:
    decision = submitted("a", 0.0).decision
    assert decision is not None
    events = [
        submitted("a", 0.0)._replace(decision=None),
        Polled(now=4.0, decisions=(decision,)),
        settled("a", 1.0),  # until 5
        submitted("b", 5.5),
        settled("b"),
    ]

    (run,) = read_trace(log(tmp_path, STARTED, *events)).runs

    assert run.calls[1].after == ("call-1",)
    assert run.calls[1].gap_s == 0.5


def test_a_call_given_up_while_it_waited_is_left_out(tmp_path: Path) -> None:
    events = [
        submitted("a", 0.0),
        settled("a"),
        submitted("b", 1.0)._replace(decision=None),
        Withdrawn(request_id="b"),
    ]

    trace = read_trace(log(tmp_path, STARTED, *events))

    assert len(trace.runs[0].calls) == 1
    assert "1 calls did not end well and are left out." in trace.notes


def test_what_a_dispatcher_records_can_be_read(tmp_path: Path) -> None:
    events: list[Event] = []
    fleet = Fleet()
    fleet.add(Instance(instance_id="i", models=(), max_num_seqs=1))
    late = Dispatcher(fleet, PolicyConfig(late_binding=True), record=events.append)
    for i in range(4):
        late.submit(submitted(f"r{i}", float(i), run=f"run{i}").request, now=float(i))
    now, waiting = 4.0, ["r0"]
    while waiting:
        late.settle(settled(waiting.pop(0), 1.0).outcome)
        waiting += [decision.request_id for decision in late.poll(now)]
        now += 1.0

    trace = read_trace(log(tmp_path, *events))

    assert [(r.run_id, r.arrival_s) for r in trace.runs] == [
        (f"run{i}", float(i)) for i in range(4)
    ]


def test_runs_that_were_logged_are_the_runs_that_were_made(tmp_path: Path) -> None:
    made = with_arrivals(load("builtin:chess", 12, seed=1), 0.2, seed=1)
    fleet = build_fleet([InstanceSpec(gpu="H100", model_shape="llama-3.1-8b", count=2)])
    events: list[Event] = []
    simulate(made.runs, fleet, record=events.append)

    read = read_trace(log(tmp_path, *events))

    assert sorted(map(shape, read.runs)) == sorted(map(shape, made.runs))
    first = made.runs[0].arrival_s or 0.0
    assert {r.run_id: r.arrival_s for r in read.runs} == pytest.approx(
        {r.run_id: (r.arrival_s or 0.0) - first for r in made.runs}
    )
    assert hits(read) == hits(made)


def shape(run: TraceRun) -> list[Any]:
    """Every call with what it followed, whatever the ids and the order of siblings."""
    told = {c.call_id: (c.stage, c.num_prompt_tokens, c.num_output_tokens) for c in run.calls}
    return sorted(
        (told[c.call_id], sorted(told[parent] for parent in c.after), round(c.gap_s, 6))
        for c in run.calls
    )


def hits(trace: Trace) -> int:
    """Prompt tokens that some earlier prompt of the trace begins with."""
    return sum(each.num_cached_tokens for run in sharing(trace.runs) for each in run)


def test_names_from_clients_cannot_break_the_trace(tmp_path: Path) -> None:
    events = [submitted("a", 0.0, run="x\n" + "y" * 9999, stage="\ud800"), settled("a")]

    (run,) = read_trace(log(tmp_path, STARTED, *events)).runs

    assert run.run_id.startswith("x�y")
    assert len(run.run_id) < 600
    assert run.calls[0].stage == "�"


def test_a_line_that_is_still_being_written_is_left_out(tmp_path: Path) -> None:
    path = log(tmp_path, STARTED, submitted("a", 0.0), settled("a"), cut='{"event": "subm')

    assert "The last line is cut off and was left out." in read_trace(path).notes


def test_a_log_without_a_good_call_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected at least one call that ended well, got none"):
        read_trace(log(tmp_path, STARTED))


@pytest.mark.parametrize(
    ("lines", "wanted"),
    [
        ('{"event": "submitted", "request": {}}', ":1: now: missing"),
        ('{"event": "submitted", "now": 1, "request": 3}', ":1: request: expected an object"),
        ('{"event": "settled", "outcome": {"ok": true}}', ":1: outcome.request_id: missing"),
        ('{"event": "started"}\n{"no": 1}\n{}', ":2: event: missing"),
    ],
)
def test_an_error_in_a_log_names_line_and_field(tmp_path: Path, lines: str, wanted: str) -> None:
    with pytest.raises(ConfigError, match=wanted):
        read_trace(log(tmp_path, cut=lines))


def test_a_router_s_store_is_read_as_its_log(tmp_path: Path) -> None:
    events: list[Event] = [STARTED, submitted("a", 0.0), settled("a")]
    store = Store(tmp_path / "state.db")
    for event in events:
        store.record(event)
    store.close()

    assert read_trace(tmp_path / "state.db").runs == read_trace(log(tmp_path, *events)).runs
