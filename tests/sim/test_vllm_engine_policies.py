"""Level 2: whose scheduler decides, and that it decides in virtual time alone."""

import json
import os
import subprocess
import sys
import time
from typing import Any

import pytest

pytest.importorskip("vllm")

from tests.sim.vllm_builders import (
    advance_to,
    call,
    drain,
    engine,
    finished,
    first_token,
    mixed_arrivals,
    run,
)
from vllm_workflow.core.config import PolicyConfig
from vllm_workflow.core.types import StageRequest
from vllm_workflow.sim.types import EngineEvent
from vllm_workflow.sim.vllm_server import VllmServer

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

SLACK = PolicyConfig()
NO_PREEMPTION = PolicyConfig(preempt=False)


def order_of_first_tokens(events: list[EngineEvent]) -> list[str]:
    times = {e.request_id: first_token(events, e.request_id).time for e in events}
    return sorted(times, key=times.__getitem__)


def waiting_calls(**urgent: Any) -> list[Any]:
    """One call takes the only seat; then come `patient`, `soon` and `urgent`, in this order."""
    return [
        (0.0, call("seated", output=50, workflow_id="w0", deadline=1000.0)),
        (0.01, call("patient", workflow_id="w1", deadline=900.0)),
        (0.02, call("soon", workflow_id="w2", deadline=100.0)),
        (0.03, call("urgent", workflow_id="w3", **urgent)),
    ]


# --- order


def test_the_workflow_scheduler_runs_waiting_calls_by_slack() -> None:
    events = run(
        engine(policy=NO_PREEMPTION, max_num_seqs=1), waiting_calls(deadline=110.0, rest_s=30.0)
    )

    assert order_of_first_tokens(events) == ["seated", "urgent", "soon", "patient"]


def test_the_service_time_that_was_predicted_counts_as_used_up() -> None:
    events = run(
        engine(policy=NO_PREEMPTION, max_num_seqs=1), waiting_calls(deadline=110.0, service_s=30.0)
    )

    assert order_of_first_tokens(events) == ["seated", "urgent", "soon", "patient"]


def test_vllms_own_scheduler_runs_them_as_they_came() -> None:
    events = run(engine(policy=None, max_num_seqs=1), waiting_calls(deadline=110.0, rest_s=30.0))

    assert order_of_first_tokens(events) == ["seated", "patient", "soon", "urgent"]


def test_vllms_priority_policy_runs_the_lowest_number_first() -> None:
    server = engine(policy=None, max_num_seqs=1, scheduling_policy="priority")

    events = run(
        server,
        [
            (0.0, call("seated", priority=0)),
            (0.001, call("later", priority=3)),
            (0.002, call("sooner", priority=1)),
        ],
    )

    assert order_of_first_tokens(events) == ["seated", "sooner", "later"]


# --- preemption, in virtual time


def test_an_urgent_call_takes_the_seat_of_one_with_slack_at_once() -> None:
    arrivals = [
        (0.0, call("batch", output=2000, workflow_id="w0", deadline=1000.0)),
        (1.0, call("urgent", output=5, workflow_id="w1", deadline=3.0)),
    ]
    server = engine(policy=SLACK, max_num_seqs=1)

    ours = run(server, arrivals)
    stock = run(engine(policy=None, max_num_seqs=1), arrivals)

    assert first_token(ours, "urgent").time < 1.1
    assert first_token(stock, "urgent").time > 20.0
    assert finished(ours, "batch").num_preemptions == 1
    assert server.stats is not None
    assert server.stats.preemptions == {"seat": 1, "kv": 0}
    assert server.stats.failures == 0
    assert (server.stats.deadline_met, server.stats.deadline_missed) == (2, 0)


def test_a_call_becomes_urgent_as_virtual_time_passes() -> None:
    server = engine(policy=SLACK, max_num_seqs=1)

    events = run(
        server,
        [
            (0.0, call("batch", output=2000, workflow_id="w0", deadline=1000.0)),
            (1.0, call("waits", output=5, workflow_id="w1", deadline=11.0)),
        ],
    )

    # Urgent is less than 5 s of slack, 6 s from its arrival on.
    assert first_token(events, "waits").time == pytest.approx(6.0, abs=0.05)


def test_a_resumed_call_is_left_alone_for_the_cooldown_in_virtual_time() -> None:
    policy = PolicyConfig(preempt_cooldown_s=4.0)
    server = engine(policy=policy, max_num_seqs=1)

    events = run(
        server,
        [
            (0.0, call("batch", output=2000, workflow_id="w0", deadline=1000.0)),
            (1.0, call("first", output=5, workflow_id="w1", deadline=3.0)),
            (2.0, call("second", output=5, workflow_id="w1", deadline=8.0)),
        ],
    )

    resumed = finished(events, "first").time
    assert first_token(events, "second").time == pytest.approx(resumed + 4.0, abs=0.1)


def test_an_urgent_call_gets_kv_blocks() -> None:
    server = engine(policy=SLACK, num_kv_blocks=101, max_model_len=1600)

    events = run(
        server,
        [
            (0.0, call("batch", prompt=800, output=700, workflow_id="w0", deadline=1000.0)),
            (1.0, call("urgent", prompt=1200, output=5, workflow_id="w1", deadline=3.0)),
        ],
    )

    assert first_token(events, "urgent").time < 1.3
    assert server.stats is not None
    assert server.stats.preemptions["kv"] == 1


# --- what travels


def test_the_plug_in_reads_what_the_router_would_have_sent() -> None:
    server = engine(policy=SLACK)
    server.submit(
        call(
            "r",
            prompt=120,
            workflow_id="run-1",
            workflow="text2sql",
            stage="generate",
            tenant_id="team",
            deadline=12.5004,
            run_arrival_time=-1.0,
            attained_s=4.0,
            attained_path_s=3.0,
            rest_s=2.25,
            service_s=1.5,
            priority=3,
            final=True,
        ),
        5.0,
    )

    assert server._scheduler._order.calls.get("r-1").request == StageRequest(
        request_id="r-1",
        arrival_time=5.0,
        workflow_id="run-1",
        workflow="text2sql",
        stage="generate",
        tenant_id="team",
        deadline=12.5,  # budgets travel in milliseconds
        run_arrival_time=-1.0,
        attained_s=4.0,
        attained_path_s=3.0,
        rest_s=2.25,
        service_s=1.5,
        priority=3,
        num_prompt_tokens=120,
        final=True,
    )


def test_a_deadline_that_has_passed_travels_as_no_budget_left() -> None:
    server = engine(policy=SLACK)
    server.submit(call(deadline=3.0), 5.0)

    assert server._scheduler._order.calls.get("r-1").request.deadline == 5.0


def test_an_ordinary_call_carries_nothing() -> None:
    server = engine(policy=SLACK)
    server.submit(call(), 0.0)

    assert server._scheduler.requests["r-1"].sampling_params.extra_args is None
    assert not server._scheduler._order.is_active


def test_by_default_a_server_runs_the_default_policy() -> None:
    assert VllmServer(num_kv_blocks=100, max_model_len=100).policy == PolicyConfig()


# --- determinism


@pytest.mark.parametrize("policy", [None, SLACK], ids=["vllm", "ours"])
def test_the_same_calls_give_the_same_events(policy: PolicyConfig | None) -> None:
    def once() -> list[EngineEvent]:
        server = engine(policy=policy, num_kv_blocks=201, max_num_seqs=8)
        events = run(server, mixed_arrivals(60))
        assert server.stats is None or server.stats.failures == 0
        return events

    assert once() == once()


def test_the_clock_of_the_machine_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    def once() -> list[EngineEvent]:
        server = engine(policy=SLACK, num_kv_blocks=201, max_num_seqs=4)
        return run(server, mixed_arrivals(60))

    expected = once()
    real_time = time.time
    monkeypatch.setattr(time, "time", lambda: 1e6 * (real_time() % 1.0))
    monkeypatch.setattr(time, "monotonic", lambda: 1e6 * (real_time() % 1.0))

    assert sum(e.num_preemptions for e in expected) > 0
    assert once() == expected


@pytest.mark.slow
def test_another_process_with_another_hash_seed_gives_the_same_events() -> None:
    script = (
        "import json, warnings; warnings.simplefilter('ignore')\n"
        "from tests.sim.vllm_builders import engine, mixed_arrivals, run\n"
        "from vllm_workflow.core.config import PolicyConfig\n"
        "events = run(engine(policy=PolicyConfig(), num_kv_blocks=201), mixed_arrivals(60))\n"
        "print(json.dumps([[e.time, e.request_id, e.num_cached_tokens] for e in events]))\n"
    )
    other = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
        timeout=600,
    )

    here = run(engine(policy=SLACK, num_kv_blocks=201), mixed_arrivals(60))

    assert json.loads(other.stdout.splitlines()[-1]) == [
        [e.time, e.request_id, e.num_cached_tokens] for e in here
    ]


def test_engines_of_one_process_do_not_disturb_each_other() -> None:
    alone = run(engine("a", policy=SLACK, num_kv_blocks=201), mixed_arrivals(30))

    a, b = (engine(i, policy=SLACK, num_kv_blocks=201) for i in "ab")
    events = []
    for instant, each in mixed_arrivals(30):
        for server in (a, b):
            got = advance_to(server, instant - 1e-9)
            server.submit(each, instant)
            events += got if server is a else []
    events += drain(a)
    drain(b)

    assert events == alone
