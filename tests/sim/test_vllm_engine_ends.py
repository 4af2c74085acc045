"""Level 2: calls that are aborted or refused, and what of a real server is not there."""

import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from tests.sim.vllm_builders import (
    RequestStatus,
    advance_to,
    approx,
    call,
    decode_s,
    drain,
    engine,
    finished,
    first_token,
    part,
    prefill_s,
    run,
)
from vllm_workflow.core.config import PolicyConfig
from vllm_workflow.core.errors import ConfigError
from vllm_workflow.sim.types import EventKind

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

every_scheduler = pytest.mark.parametrize("policy", [None, PolicyConfig()], ids=["vllm", "ours"])
either_mode = pytest.mark.parametrize("async_scheduling", [True, False], ids=["async", "sync"])


STATES: dict[str, Callable[[Any], bool]] = {
    "not yet seen": lambda request: True,
    "waiting": lambda request: request.num_computed_tokens == 0,
    "prefill": lambda request: 0 < request.num_computed_tokens < request.num_prompt_tokens,
    "decode": lambda request: request.num_output_tokens > 3,
    "preempted": lambda request: request.status == RequestStatus.PREEMPTED,
}


@either_mode
@every_scheduler
@pytest.mark.parametrize("state", STATES)
def test_an_abort_frees_everything_and_disturbs_nobody(
    state: str, policy: PolicyConfig | None, async_scheduling: bool
) -> None:
    server = engine(
        policy=policy,
        async_scheduling=async_scheduling,
        num_kv_blocks=101,
        max_num_batched_tokens=64,
        max_num_seqs=1 if state == "waiting" else 2,
    )
    server.submit(call("other", prompt=50, output=800, workflow_id="w", deadline=1.0), 0.0)
    events = advance_to(server, 0.1)
    server.submit(call("gone", prompt=600, output=900), 0.1)
    while not STATES[state](server._scheduler.requests["gone-2"]):
        events += server.advance(server.next_event_time())
        assert not [e for e in events if e.kind is EventKind.FINISHED], "it never was in this state"

    server.abort("gone", max(0.1, server._clock.now))
    events += drain(server)

    assert finished(events, "other").num_preemptions == 0
    assert not [e for e in events if e.request_id == "gone" and e.kind is EventKind.FINISHED]
    assert server.num_free_kv_blocks == 100
    assert server.next_event_time() == math.inf
    assert not server._scheduler.requests


def test_an_engine_whose_last_call_is_aborted_ends_its_step_and_takes_the_next_call() -> None:
    server = engine()
    server.submit(call("gone", prompt=2000, output=50), 0.0)
    server.advance(0.0)
    server.abort("gone", 0.01)

    server.submit(call("next", output=1), 0.02)

    # Two steps are with the GPU: the prompt, and a token that nobody waits for any more.
    busy_s = prefill_s(2000) + decode_s(2001)
    assert first_token(drain(server), "next").time == approx(busy_s + prefill_s(100))


def test_an_engine_emptied_while_it_plans_looks_again_when_its_step_ends() -> None:
    server = engine(schedule_s=0.01)
    server.submit(call("gone"), 0.0)
    server.advance(0.0)
    server.abort("gone", 0.005)

    server.submit(call("next", output=1), 0.02)

    end_1 = 0.01 + prefill_s(100)
    assert server.next_event_time() == approx(end_1)
    assert first_token(drain(server), "next").time == approx(end_1 + 0.01 + prefill_s(100))


def test_an_engine_that_is_empty_but_busy_plans_when_its_step_ends() -> None:
    server = engine()
    first = run(server, [(0.0, call("a", output=1))])
    server = engine()
    server.submit(call("a", output=1), 0.0)
    advance_to(server, first[-1].time)

    # a has ended, and the step planned behind it runs for nobody. b and c come while it does.
    server.submit(call("b", output=1), first[-1].time + 0.001)
    assert server.next_event_time() == approx(prefill_s(100) + decode_s(101))
    server.submit(call("c", output=1), first[-1].time + 0.002)
    events = drain(server)

    assert first_token(events, "b").time == first_token(events, "c").time


@either_mode
def test_a_call_may_come_again_while_the_step_it_was_aborted_in_still_runs(
    async_scheduling: bool,
) -> None:
    server = engine(async_scheduling=async_scheduling)
    server.submit(call(prompt=1000, output=50), 0.0)
    server.advance(0.0)
    server.abort("r", 0.01)

    server.submit(call(prompt=100, output=3), 0.02)
    events = drain(server)

    busy_s = prefill_s(1000) + (decode_s(1001) if async_scheduling else 0.0)
    assert first_token(events).time == approx(busy_s + prefill_s(100))
    assert finished(events).time == approx(busy_s + prefill_s(100) + decode_s(101, 102))


def test_aborting_a_stranger_does_nothing() -> None:
    server = engine()

    server.abort("nobody", 1.0)

    assert server.next_event_time() == math.inf


# --- what is refused


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (
            {"prompt": 9000},
            "a: call 'r': expected at most max_model_len = 8192 tokens of prompt and answer, "
            "got 9000 + 10",
        ),
        ({"prompt": 300, "output": 400}, "that fit into 640 tokens of KV cache, got 300 + 400"),
        ({"prompt": 0}, "expected at least 1 prompt token and 0 output tokens, got 0 and 10"),
        ({"output": -1}, "expected at least 1 prompt token and 0 output tokens, got 100 and -1"),
        ({"prefix": (part("p", 101),)}, "prefix: expected parts of at most 100 tokens"),
        ({"prefix": (part("p", -1),)}, "prefix: expected parts of 0 or more tokens"),
        ({"rest_s": math.inf}, "rest_s: expected a finite number of seconds"),
    ],
)
def test_a_call_that_could_never_end_is_refused_before_vllm_sees_it(
    bad: dict[str, Any], message: str
) -> None:
    server = engine(num_kv_blocks=41)

    with pytest.raises(ConfigError) as refused:
        server.submit(call(**bad), 0.0)

    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
    assert server.next_event_time() == math.inf
    assert finished(run(server, [(0.0, call())])).time > 0.0


def test_the_longest_call_that_fits_the_kv_cache_ends() -> None:
    server = engine(num_kv_blocks=41)

    assert finished(run(server, [(0.0, call(prompt=341, output=300))])).time > 0.0


def test_an_id_that_is_here_already_is_refused() -> None:
    server = engine()
    server.submit(call(), 0.0)

    with pytest.raises(ValueError, match="call 'r' is already here"):
        server.submit(call(), 0.0)


def test_time_does_not_run_backwards() -> None:
    server = engine()
    server.submit(call(), 5.0)

    with pytest.raises(ValueError, match=r"expected a finite instant from 5\.0 on, got 4\.0"):
        server.advance(4.0)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"num_kv_blocks": 1}, "num_kv_blocks: expected an integer from 2, got 1"),
        ({"max_num_seqs": 0}, "max_num_seqs: expected an integer from 1, got 0"),
        ({"block_size": 16.0}, "block_size: expected an integer from 1, got 16.0"),
        ({"max_num_seqs": 4096}, "max_num_batched_tokens: expected at least max_num_seqs = 4096"),
        ({"scheduling_policy": "edf"}, "scheduling_policy: expected one of ('fcfs', 'priority')"),
        ({"schedule_s": -1.0}, "a: schedule_s: expected a number from 0, got -1.0"),
    ],
)
def test_a_server_that_could_not_be_started_is_refused(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        engine(**bad)

    assert message in str(refused.value)


# --- nothing of a real server


def test_no_scheduler_can_see_how_long_an_answer_will_be() -> None:
    server = engine(policy=PolicyConfig())
    server.submit(call("short", output=1), 0.0)
    server.submit(call("long", output=1000), 0.0)

    short, long = server._scheduler.requests.values()

    assert short.max_tokens == long.max_tokens == 8192 - 100
    assert short.sampling_params == long.sampling_params


def test_nothing_is_published_and_no_thread_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    threads = threading.active_count()

    run(engine(policy=PolicyConfig()), [(0.0, call(workflow_id="w", deadline=9.0))])

    assert list(tmp_path.iterdir()) == []
    assert threading.active_count() == threads
