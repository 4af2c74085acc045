"""Decisions that look at a part of the fleet."""

from hypothesis import given
from hypothesis import strategies as st

from tests.builders import FAST, SLOW, dispatcher, fleet, instance, outcome, stage_request
from vllm_workflow.core.config import PolicyConfig
from vllm_workflow.core.dispatcher import Dispatcher
from vllm_workflow.core.fleet import LARGE_FLEET
from vllm_workflow.core.prefix import Segment

NUM = 3 * LARGE_FLEET
SEEN_BEFORE = (Segment(7, 5_000),)


def large(max_num_seqs: int = 1, *, late: bool = True, num: int = NUM) -> Dispatcher:
    each = [instance(f"i{n}", latency=SLOW, max_num_seqs=max_num_seqs) for n in range(num)]
    return dispatcher(*each, config=PolicyConfig(late_binding=late))


def test_a_decision_looks_at_a_part_of_a_large_fleet() -> None:
    decision = large().submit(stage_request(), now=0.0)

    assert decision is not None
    assert 1 < len(decision.candidates) <= LARGE_FLEET


def test_a_small_fleet_is_looked_at_whole() -> None:
    decision = large(num=LARGE_FLEET).submit(stage_request(), now=0.0)

    assert decision is not None
    assert len(decision.candidates) == LARGE_FLEET


def test_every_seat_of_a_large_fleet_is_found_and_then_calls_wait() -> None:
    brain = large()

    decisions = [brain.submit(stage_request(f"r{n}"), now=0.0) for n in range(NUM)]

    assert {d.chosen.instance_id for d in decisions if d} == {f"i{n}" for n in range(NUM)}
    assert brain.submit(stage_request("waits"), now=0.0) is None
    brain.settle(outcome("r5", decisions[5].chosen.instance_id))
    (bound,) = brain.poll(1.0)
    assert bound.chosen.instance_id == decisions[5].chosen.instance_id


def test_a_prompt_goes_back_to_the_instance_of_a_large_fleet_that_holds_it() -> None:
    brain = large(max_num_seqs=8)
    prompt = stage_request("first", num_prompt_tokens=5_100, prefix=SEEN_BEFORE)
    first = brain.submit(prompt, now=0.0)
    assert first is not None
    brain.settle(outcome("first", first.chosen.instance_id))
    for n in range(100):  # whatever else has come and gone
        decision = brain.submit(stage_request(f"r{n}"), now=1.0)
        brain.settle(outcome(f"r{n}", decision.chosen.instance_id))

    again = brain.submit(prompt._replace(request_id="again"), now=2.0)

    assert again.chosen.instance_id == first.chosen.instance_id
    assert again.chosen.num_cached_tokens > 0


def test_least_outstanding_is_the_least_of_all_however_large_the_fleet() -> None:
    each = [instance(f"i{n}", max_num_seqs=9) for n in range(NUM)]
    brain = dispatcher(*each, config=PolicyConfig(dispatch="least-outstanding"))

    chosen = [brain.submit(stage_request(f"r{n}"), now=0.0).chosen for n in range(NUM)]

    assert len({c.instance_id for c in chosen}) == NUM


calls = st.lists(st.tuples(st.integers(0, 4), st.integers(1, 400), st.booleans()), max_size=30)


@given(calls, st.integers(1, 400))
def test_what_has_room_is_found_by_the_room_it_has(
    made: list[tuple[int, int, bool]], num_tokens: int
) -> None:
    each = fleet(
        *(instance(f"i{n}", latency=FAST, max_num_seqs=4, num_kv_tokens=500) for n in range(5))
    )
    num_used, num_calls = [0] * 5, [0] * 5
    for number, (at, num_prompt_tokens, ends) in enumerate(made):
        request = stage_request(
            str(number), num_prompt_tokens=num_prompt_tokens, expected_output_tokens=1.0
        )
        chosen = each.candidates(request)[at]
        each.reserve(str(number), chosen, request=request)
        if ends:
            each.release(str(number), chosen.instance_id)
        else:
            num_used[at] += num_prompt_tokens + 1
            num_calls[at] += 1
    asked = stage_request(num_prompt_tokens=num_tokens, expected_output_tokens=1.0)

    expected = any(
        not calls or (calls < 4 and used + num_tokens + 1 <= 500)
        for used, calls in zip(num_used, num_calls)
    )

    assert each.can_start(asked) is expected
    assert each.has_room() is any(
        not calls or (calls < 4 and used < 500) for used, calls in zip(num_used, num_calls)
    )
