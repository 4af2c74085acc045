import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.builders import FAST, SLOW, instance, stage_request
from tests.core.binding_builders import LATE, RELEGATING, brain, end
from vllm_workflow.core.backlog import Backlog
from vllm_workflow.core.config import PolicyConfig
from vllm_workflow.core.errors import ConfigError, NoInstanceError
from vllm_workflow.core.prefix import Segment
from vllm_workflow.core.types import Decision


def test_a_call_waits_until_a_seat_is_free() -> None:
    each = brain(instance("a", max_num_seqs=1))
    first = each.submit(stage_request("first"), now=0.0)
    assert first is not None

    assert each.submit(stage_request("second"), now=0.1) is None
    assert each.poll(0.2) == []
    end(each, first)

    assert [d.request_id for d in each.poll(0.3)] == ["second"]
    assert each.poll(0.3) == []


def test_a_call_waits_until_the_kv_cache_has_room() -> None:
    each = brain(instance("a", num_kv_tokens=250))
    first = each.submit(stage_request("first"), now=0.0)
    second = each.submit(stage_request("second"), now=0.0)
    assert first is not None
    assert second is not None

    assert each.submit(stage_request("third"), now=0.0) is None
    end(each, second)

    assert [d.request_id for d in each.poll(1.0)] == ["third"]


def test_the_room_that_comes_free_goes_to_the_first_in_order() -> None:
    each = brain(instance("a", max_num_seqs=1))
    running = each.submit(stage_request("running"), now=0.0)
    assert running is not None
    for name, deadline in (("late", 90.0), ("early", 30.0), ("middle", 60.0)):
        each.submit(stage_request(name, deadline=deadline), now=0.0)

    order = []
    while running is not None:
        end(each, running)
        running = next(iter(each.poll(1.0)), None)
        order.extend([running.request_id] if running else [])

    assert order == ["early", "middle", "late"]


def test_the_client_s_priority_goes_before_the_policy_s_order() -> None:
    backlog = Backlog()
    backlog.add(stage_request("ordinary"), 1.0, 0, ())
    backlog.add(stage_request("favoured", priority=-1), 2.0, 0, ())

    assert [w.request.request_id for w in backlog] == ["favoured", "ordinary"]


@given(
    st.lists(st.tuples(st.sampled_from("ab"), st.floats(0.0, 9.0)), max_size=12),
    st.sets(st.integers(0, 11)),
    st.sampled_from(["", "a"]),
)
def test_a_walk_is_in_order_whatever_is_taken_out_on_the_way(
    calls: list[tuple[str, float]], taken: set[int], passed_over: str
) -> None:
    backlog = Backlog()
    for number, (model, key) in enumerate(calls):
        backlog.add(stage_request(str(number), model=model), key)
    expected = [w for w in backlog if w.request.model != passed_over]

    walked = []
    for waiting in backlog.walk({(passed_over, ())}):
        walked.append(waiting)
        if int(waiting.request.request_id) in taken:
            backlog.remove(waiting.request.request_id)

    assert walked == expected == sorted(expected)
    assert len(backlog) == len(calls) - sum(int(w.request.request_id) in taken for w in walked)


def test_a_call_that_is_given_up_takes_nobody_s_place() -> None:
    each = brain(instance("a", max_num_seqs=1))
    running = each.submit(stage_request("running"), now=0.0)
    assert running is not None
    each.submit(stage_request("gone"), now=0.0)
    each.submit(stage_request("next"), now=0.0)

    assert each.withdraw("gone")
    assert not each.withdraw("gone")
    end(each, running)

    assert [d.request_id for d in each.poll(1.0)] == ["next"]


def test_a_call_that_waits_is_not_submitted_twice() -> None:
    each = brain(instance("a", max_num_seqs=1))
    each.submit(stage_request("running"), now=0.0)
    each.submit(stage_request("waiting"), now=0.0)

    with pytest.raises(ValueError, match="request 'waiting' is already waiting"):
        each.submit(stage_request("waiting"), now=0.0)


def test_a_small_call_does_not_delay_a_large_one_that_goes_first() -> None:
    each = brain(instance("a", num_kv_tokens=1_000))
    half = stage_request("half", num_prompt_tokens=500, expected_output_tokens=100.0)
    running = each.submit(half, now=0.0)
    assert running is not None
    large = stage_request("large", deadline=9.0, num_prompt_tokens=900)
    assert each.submit(large, now=0.0) is None

    # It would still be there when the large one could start.
    long = stage_request("long", num_prompt_tokens=10, expected_output_tokens=300.0)
    short = stage_request("short", num_prompt_tokens=10, expected_output_tokens=5.0)

    assert each.submit(long, now=0.0) is None
    assert each.submit(short, now=0.0) is not None


def test_a_slow_instance_with_room_is_not_left_idle() -> None:
    each = brain(instance("fast", latency=FAST, max_num_seqs=1), instance("slow", latency=SLOW))
    running = each.submit(stage_request("short", expected_output_tokens=2.0), now=0.0)
    assert running is not None
    assert running.chosen.instance_id == "fast"

    # It would be done sooner on the fast one, the wait included.
    second = each.submit(stage_request("long", expected_output_tokens=500.0), now=0.0)

    assert second is not None
    assert second.chosen.instance_id == "slow"


def test_an_idle_instance_takes_a_call_whose_answer_is_expected_to_overflow_its_cache() -> None:
    each = brain(instance("a", num_kv_tokens=50))
    wordy = stage_request("wordy", num_prompt_tokens=40, expected_output_tokens=500.0)

    assert each.submit(wordy, now=0.0) is not None


def test_a_prompt_that_seems_too_long_for_every_cache_is_for_an_engine_to_refuse() -> None:
    each = brain(instance("a", num_kv_tokens=50), instance("b", num_kv_tokens=90))

    assert each.submit(stage_request(num_prompt_tokens=100), now=0.0) is not None


def test_a_call_goes_only_where_the_cache_can_hold_it() -> None:
    each = brain(instance("small", num_kv_tokens=90), instance("large", num_kv_tokens=200))
    long = stage_request(num_prompt_tokens=100)

    decision = each.submit(long, now=0.0)

    assert decision is not None
    assert [c.instance_id for c in decision.candidates] == ["large"]


def test_calls_for_a_full_model_do_not_keep_others_from_an_idle_one() -> None:
    each = brain(
        instance("full", models=("m",), max_num_seqs=1), instance("idle", models=("other",))
    )
    each.submit(stage_request("running", model="m"), now=0.0)
    for number in range(100):
        each.submit(stage_request(f"r{number}", model="m", deadline=1.0), now=0.0)

    assert each.submit(stage_request("other", model="other"), now=0.0) is not None


def test_an_instance_that_recovers_takes_as_many_as_it_has_seats_for() -> None:
    each = brain(instance("a", max_num_seqs=1), instance("b", max_num_seqs=80))
    each.mark("b", healthy=False)
    for number in range(101):
        each.submit(stage_request(f"r{number}"), now=0.0)

    each.mark("b", healthy=True)

    assert len(each.poll(1.0)) == 80


def test_a_call_that_leaves_no_longer_holds_up_others() -> None:
    each = brain(instance("a", num_kv_tokens=1_000))
    half = stage_request("half", num_prompt_tokens=500, expected_output_tokens=100.0)
    each.submit(half, now=0.0)
    each.submit(stage_request("large", deadline=9.0, num_prompt_tokens=900), now=0.0)
    each.submit(stage_request("long", num_prompt_tokens=10, expected_output_tokens=300.0), now=0.0)

    each.withdraw("large")

    assert [d.request_id for d in each.poll(0.1)] == ["long"]


def test_calls_that_no_healthy_instance_serves_any_more_are_named() -> None:
    each = brain(instance("a", max_num_seqs=1), instance("b", max_num_seqs=1))
    running = each.submit(stage_request("running"), now=0.0, exclude=["b"])
    assert running is not None
    each.submit(stage_request("both"), now=0.0)
    each.submit(stage_request("neither"), now=0.0)
    each.submit(stage_request("only-b"), now=0.0, exclude=["a"])

    each.mark("b", healthy=False)

    assert [r.request_id for r in each.waiting.stranded()] == ["only-b"]


def test_a_restarted_instance_is_not_believed_to_hold_prefixes() -> None:
    each = brain(instance("a"))
    prefix = (Segment(1, 90),)
    first = each.submit(stage_request("first", prefix=prefix), now=0.0)
    assert first is not None
    end(each, first)
    each.mark("a", healthy=False)
    each.mark("a", healthy=True)

    again = each.submit(stage_request("again", prefix=prefix), now=1.0)

    assert again is not None
    assert again.chosen.num_cached_tokens == 0


def test_an_instance_that_recovers_takes_what_waits() -> None:
    each = brain(instance("a", max_num_seqs=1), instance("b", max_num_seqs=1))
    each.mark("b", healthy=False)
    each.submit(stage_request("running"), now=0.0)
    assert each.submit(stage_request("waiting"), now=0.0) is None

    each.mark("b", healthy=True)

    assert [d.chosen.instance_id for d in each.poll(1.0)] == ["b"]


def test_with_no_healthy_instance_there_is_nothing_to_wait_for() -> None:
    each = brain(instance("a"))
    each.mark("a", healthy=False)

    with pytest.raises(NoInstanceError):
        each.submit(stage_request(), now=0.0)


def test_to_take_each_in_turn_cannot_wait() -> None:
    with pytest.raises(ConfigError, match="late_binding: expected false with dispatch"):
        PolicyConfig(dispatch="round-robin", late_binding=True)


@given(
    sizes=st.lists(st.tuples(st.integers(1, 1_500), st.floats(1.0, 400.0)), max_size=40),
    picks=st.lists(st.integers(0, 1_000), min_size=200, max_size=200),
    config=st.sampled_from([LATE, RELEGATING]),
)
def test_every_call_is_bound_once_and_never_do_all_wait(
    sizes: list[tuple[int, float]], picks: list[int], config: PolicyConfig
) -> None:
    each = brain(
        instance("a", max_num_seqs=3, num_kv_tokens=2_000),
        instance("b", latency=SLOW, max_num_seqs=2, num_kv_tokens=900),
        config=config,
    )
    now, bound, live = 0.0, list[str](), list[Decision]()
    todo = [
        stage_request(
            f"r{n}",
            deadline=100.0 + 7 * (n % 5) if n % 3 else math.inf,
            num_prompt_tokens=tokens,
            expected_output_tokens=output,
        )
        for n, (tokens, output) in enumerate(sizes)
    ]
    for pick in picks:
        now += 0.1
        if todo and pick % 2:
            decision = each.submit(todo.pop(), now=now)
            live.extend([decision] if decision else [])
        elif live:
            end(each, live.pop(pick % len(live)))
        live.extend(each.poll(now))
        assert not each.waiting or live, "calls wait and no instance has anything to do"
        for instance_id, seats in (("a", 3), ("b", 2)):
            assert each.fleet.num_outstanding(instance_id) <= seats
    while live or todo:
        if todo:
            decision = each.submit(todo.pop(), now=now)
            live.extend([decision] if decision else [])
        if live:
            last = live.pop()
            bound.append(last.request_id)
            end(each, last)
        live.extend(each.poll(now))

    assert not each.waiting
    assert each.num_in_flight == each.fleet.num_outstanding() == 0
    assert len(set(bound)) == len(bound)
