"""Level 2: what a call costs in virtual time, and what becomes of it."""

import pytest

pytest.importorskip("vllm")

from tests.sim.vllm_builders import (
    LATENCY,
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
from vllm_workflow.core.latency import prefill_attention
from vllm_workflow.sim.types import EventKind

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

every_scheduler = pytest.mark.parametrize("policy", [None, PolicyConfig()], ids=["vllm", "ours"])
either_mode = pytest.mark.parametrize("async_scheduling", [True, False], ids=["async", "sync"])


# --- what a step costs


@either_mode
@every_scheduler
def test_a_lone_call_takes_exactly_what_the_latency_model_says(
    policy: PolicyConfig | None, async_scheduling: bool
) -> None:
    server = engine(policy=policy, async_scheduling=async_scheduling)

    events = run(server, [(7.0, call(prompt=5000, output=4, workflow_id="w", deadline=60.0))])

    ttft_s = prefill_s(2048, 2048, 904)
    assert first_token(events).time == approx(7.0 + ttft_s)
    assert ttft_s == pytest.approx(LATENCY.prefill_s(5000))
    assert finished(events).time == approx(7.0 + ttft_s + decode_s(5001, 5002, 5003))


@either_mode
@pytest.mark.parametrize("output", [0, 1])
def test_an_answer_of_one_token_or_none_ends_with_its_first(
    output: int, async_scheduling: bool
) -> None:
    events = run(engine(async_scheduling=async_scheduling), [(0.0, call(prompt=10, output=output))])

    assert [e.kind for e in events] == [EventKind.FIRST_TOKEN, EventKind.FINISHED]
    assert events[0].time == events[1].time == approx(prefill_s(10))


@every_scheduler
def test_without_async_a_newcomer_joins_the_next_step(policy: PolicyConfig | None) -> None:
    server = engine(policy=policy, async_scheduling=False)
    a, b = call("a", output=3, deadline=60.0), call("b", output=2, deadline=60.0)

    events = run(server, [(0.0, a), (0.005, b)])

    end_1 = prefill_s(100)
    end_2 = end_1 + LATENCY.step_s(
        num_prefill_tokens=100,
        num_decode_seqs=1,
        num_kv_tokens=101,
        prefill_attention=prefill_attention(100),
    )
    end_3 = end_2 + LATENCY.step_s(num_decode_seqs=2, num_kv_tokens=102 + 101)
    assert first_token(events, "a").time == approx(end_1)
    assert first_token(events, "b").time == approx(end_2)
    assert finished(events, "a").time == finished(events, "b").time == approx(end_3)
    assert server.num_steps == 3


@every_scheduler
def test_with_async_a_newcomer_waits_for_the_step_that_is_planned_already(
    policy: PolicyConfig | None,
) -> None:
    server = engine(policy=policy)
    a, b = call("a", output=3, deadline=60.0), call("b", output=2, deadline=60.0)

    events = run(server, [(0.0, a), (0.005, b)])

    end_1 = prefill_s(100)
    end_2 = end_1 + decode_s(101)  # planned when the first one started, so without b
    end_3 = end_2 + LATENCY.step_s(
        num_prefill_tokens=100,
        num_decode_seqs=1,
        num_kv_tokens=102,
        prefill_attention=prefill_attention(100),
    )
    # Planned before a's last token was known: it takes part once more.
    end_4 = end_3 + LATENCY.step_s(num_decode_seqs=2, num_kv_tokens=103 + 101)
    end_5 = end_4 + decode_s(102)
    assert first_token(events, "a").time == approx(end_1)
    assert finished(events, "a").time == first_token(events, "b").time == approx(end_3)
    assert finished(events, "b").time == approx(end_4)
    assert server.num_steps == 5
    assert server.busy_s == approx(end_5)


def test_three_calls_share_the_token_budget_of_a_step_in_order_of_arrival() -> None:
    server = engine(async_scheduling=False, max_num_batched_tokens=64, max_num_seqs=8)
    calls = [call("a", prompt=100, output=2), call("b", prompt=50), call("c", prompt=30)]

    events = run(server, [(0.0, each) for each in calls])

    def step_s(*chunks: tuple[int, int], decode: tuple[int, ...] = ()) -> float:
        """Chunks as (tokens, tokens before them); decodes as contexts."""
        return LATENCY.step_s(
            num_prefill_tokens=sum(n for n, _ in chunks),
            prefill_attention=sum(prefill_attention(n, before) for n, before in chunks),
            num_decode_seqs=len(decode),
            num_kv_tokens=sum(decode),
        )

    end_1 = step_s((64, 0))
    end_2 = end_1 + step_s((36, 64), (28, 0))
    end_3 = end_2 + step_s((22, 28), (30, 0), decode=(101,))
    assert first_token(events, "a").time == approx(end_2)
    assert finished(events, "a").time == approx(end_3)
    assert first_token(events, "b").time == first_token(events, "c").time == approx(end_3)


def test_an_idle_engine_starts_when_a_call_arrives() -> None:
    server = engine()

    events = run(server, [(0.0, call("early")), (100.0, call("late"))])

    assert first_token(events, "late").time == approx(100.0 + prefill_s(100))


def test_calls_of_one_instant_share_the_first_step() -> None:
    events = run(engine(), [(1.0, call("a")), (1.0, call("b"))])

    assert first_token(events, "a").time == first_token(events, "b").time


def test_a_call_that_arrives_as_a_step_ends_can_be_in_the_next_plan() -> None:
    server = engine(async_scheduling=False)
    server.submit(call("a", output=2), 0.0)
    server.advance(0.0)
    end_1 = server.next_event_time()

    server.submit(call("b", output=1), end_1)
    events = drain(server)

    assert finished(events, "a").time == finished(events, "b").time


def test_planning_takes_time_before_each_step_unless_it_overlaps_with_the_one_before() -> None:
    arrivals = [(0.0, call(output=4))]

    sync = run(engine(async_scheduling=False, schedule_s=0.002), arrivals)
    overlapping = run(engine(schedule_s=0.002), arrivals)
    slower_than_steps = run(engine(schedule_s=0.1), arrivals)

    steps_s = prefill_s(100) + decode_s(101, 102, 103)
    assert finished(sync).time == approx(4 * 0.002 + steps_s)
    assert finished(overlapping).time == approx(0.002 + steps_s)
    # The loop plans a fifth step before it looks at what the fourth gave.
    assert finished(slower_than_steps).time == approx(5 * 0.1)


# --- the prefix cache


def test_a_shared_prefix_is_computed_once() -> None:
    server = engine()
    template = part("template", 1000)

    events = run(
        server,
        [
            (0.0, call("first", prompt=3000, prefix=(template,))),
            (9.0, call("second", prompt=3000, prefix=(template,))),
        ],
    )

    num_cached = 1000 // 16 * 16
    assert first_token(events, "first").num_cached_tokens == 0
    assert first_token(events, "second").num_cached_tokens == num_cached
    assert finished(events, "second").num_cached_tokens == num_cached
    assert first_token(events, "second").time == approx(
        9.0 + prefill_s(3000 - num_cached, num_cached_tokens=num_cached)
    )


def test_a_call_without_a_shared_prefix_finds_nothing() -> None:
    events = run(engine(), [(0.0, call("first", prompt=500)), (9.0, call("second", prompt=500))])

    assert first_token(events, "second").num_cached_tokens == 0


def test_a_whole_prompt_in_the_cache_leaves_one_block_to_compute() -> None:
    server, everything = engine(), (part("everything", 160),)

    events = run(
        server,
        [
            (0.0, call("first", prompt=160, prefix=everything)),
            (9.0, call("second", prompt=160, prefix=everything)),
        ],
    )

    assert first_token(events, "second").num_cached_tokens == 144


def test_engines_do_not_share_a_cache() -> None:
    a, b = engine("a"), engine("b")
    shared = call(prompt=500, prefix=(part("template", 400),))
    run(a, [(0.0, shared)])

    assert first_token(run(b, [(0.0, shared)])).num_cached_tokens == 0


# --- room


@either_mode
def test_a_full_kv_cache_preempts_and_every_call_still_ends(async_scheduling: bool) -> None:
    server = engine(num_kv_blocks=41, async_scheduling=async_scheduling)
    calls = [call(f"r{i}", prompt=100, output=200) for i in range(6)]

    events = run(server, [(0.01 * i, each) for i, each in enumerate(calls)])

    ends = [finished(events, each.request.request_id) for each in calls]
    assert sum(e.num_preemptions for e in ends) > 0
    assert server.num_free_kv_blocks == 40
    # What was computed again shows as prefill beyond the prompts.
    assert server.num_prefill_tokens > 600


def test_a_call_waits_for_a_seat() -> None:
    server = engine(max_num_seqs=1, async_scheduling=False)

    events = run(server, [(0.0, call("a")), (0.001, call("b"))])

    assert first_token(events, "b").time == approx(finished(events, "a").time + prefill_s(100))
