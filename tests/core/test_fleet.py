import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.builders import FAST, SLOW, candidate, fleet, instance, stage_request
from vllm_workflow.core.fleet import Fleet
from vllm_workflow.core.prefix import Segment


def predicted_finish_s(each: Fleet, instance_id: str) -> float:
    (found,) = (c for c in each.candidates(stage_request()) if c.instance_id == instance_id)
    return found.finish_s


def fill(each: Fleet, instance_id: str, num_calls: int) -> None:
    for i in range(num_calls):
        (chosen,) = (c for c in each.candidates(stage_request()) if c.instance_id == instance_id)
        each.reserve(f"{instance_id}-{i}", chosen)


def test_the_faster_instance_is_predicted_to_finish_first() -> None:
    fast, slow = fleet(instance("a", latency=FAST), instance("b", latency=SLOW)).candidates(
        stage_request()
    )

    assert fast.prefill_s < slow.prefill_s
    assert fast.decode_s < slow.decode_s
    assert fast.harm_s == fast.queue_s == 0.0


def test_calls_beside_each_other_harm_each_other() -> None:
    each = fleet(instance("a"))
    fill(each, "a", 10)

    (tenth,) = each.candidates(stage_request())

    assert tenth.harm_s > 0.0
    assert tenth.num_outstanding == 10
    assert tenth.outstanding_s == pytest.approx(each.outstanding_s("a"))


def test_a_call_waits_for_the_seat_that_is_predicted_to_come_free_first() -> None:
    each = fleet(instance("a", max_num_seqs=2))
    each.reserve("long", candidate("a", prefill_s=30.0), now=0.0)
    each.reserve("short", candidate("a", prefill_s=5.0), now=1.0)

    (third,) = each.candidates(stage_request(), now=2.0)
    each.reserve("third", third, now=2.0)
    (fourth,) = each.candidates(stage_request(), now=2.0)

    assert third.queue_s == pytest.approx(6.0 - 2.0)
    assert fourth.queue_s == pytest.approx(third.finish_s)


def test_an_overdue_call_is_taken_to_last_the_longer_the_older_it_is() -> None:
    each = fleet(instance("a", max_num_seqs=1))
    each.reserve("stuck", candidate("a", prefill_s=1.0), now=0.0)

    waits = [each.candidates(stage_request(), now=now)[0].queue_s for now in (2.0, 10.0, 100.0)]

    assert 0.0 < waits[0] < waits[1] < waits[2]


def test_a_call_waits_for_room_in_the_kv_cache() -> None:
    each = fleet(instance("a", num_kv_tokens=1_000))
    big = stage_request(num_prompt_tokens=700, expected_output_tokens=100.0)
    (first,) = each.candidates(big, now=0.0)
    each.reserve("first", first, now=0.0, request=big)

    (second,) = each.candidates(big, now=0.0)
    (small,) = each.candidates(
        stage_request(num_prompt_tokens=100, expected_output_tokens=50.0), now=0.0
    )

    assert first.queue_s == small.queue_s == 0.0
    assert second.queue_s == pytest.approx(first.finish_s)


def test_a_prompt_that_shares_its_head_needs_less_room_and_less_prefill() -> None:
    each = fleet(instance("a", num_kv_tokens=1_000))
    head = (Segment(1, 600),)
    sharing = stage_request(num_prompt_tokens=700, expected_output_tokens=100.0, prefix=head)
    (first,) = each.candidates(sharing, now=0.0)
    each.reserve("first", first, now=0.0, request=sharing)

    (second,) = each.candidates(sharing, now=0.0)

    assert second.queue_s == 0.0
    assert second.prefill_s < first.prefill_s


def test_a_call_that_did_not_run_leaves_no_prefix_behind() -> None:
    each = fleet(instance("a", num_kv_tokens=1_000))
    request = stage_request(num_prompt_tokens=700, prefix=(Segment(1, 600),))
    (cold,) = each.candidates(request)
    each.reserve("r", cold, request=request)
    each.release("r", "a", ran=False)
    (still_cold,) = each.candidates(request)
    each.reserve("r", cold, request=request)
    each.release("r", "a")
    (warm,) = each.candidates(request)

    assert still_cold.prefill_s == cold.prefill_s
    assert warm.prefill_s < cold.prefill_s


def test_only_healthy_instances_that_serve_the_model_are_candidates() -> None:
    each = fleet(
        instance("a", models=("m",)),
        instance("b", models=("m", "n")),
        instance("c", models=("o",)),
        instance("any"),
        instance("ill", models=("m",)),
    )
    each.mark("ill", healthy=False)

    def ids(model: str, exclude: tuple[str, ...] = ()) -> list[str]:
        request = stage_request(model=model)
        return [c.instance_id for c in each.candidates(request, exclude=exclude)]

    assert ids("m") == ["a", "b", "any"]
    assert ids("m", exclude=("a",)) == ["b", "any"]
    assert ids("n") == ["b", "any"]
    assert ids("") == ["a", "b", "c", "any"]


def test_a_model_of_an_ill_instance_is_still_served_in_principle() -> None:
    each = fleet(instance("a", models=("m",)))
    each.mark("a", healthy=False)

    assert each.serves("m")
    assert not each.serves("n")
    assert each.mean_service_s("m", 100, 10.0) > 0.0


def test_an_ill_instance_does_not_count_for_the_rest_of_a_run() -> None:
    each = fleet(instance("a", latency=FAST), instance("b", latency=SLOW))
    both_s = each.mean_service_s("", 100, 10.0)
    each.mark("b", healthy=False)

    assert each.mean_service_s("", 100, 10.0) < both_s


def test_an_instance_that_comes_back_keeps_its_calls() -> None:
    each = fleet(instance("a"))
    fill(each, "a", 3)
    each.add(instance("a", max_num_seqs=2))

    assert each.num_outstanding("a") == 3


def test_a_call_is_reserved_once() -> None:
    each = fleet(instance("a"))
    each.reserve("r", candidate("a"))

    with pytest.raises(ValueError, match="request 'r' is already reserved on instance 'a'"):
        each.reserve("r", candidate("a"))


@pytest.mark.parametrize("factor", [0.25, 3.0])
def test_drift_finds_the_true_speed(factor: float) -> None:
    each = fleet(instance("a"))
    true_s = predicted_finish_s(each, "a") * factor
    for _ in range(200):
        each.observe("a", predicted_s=predicted_finish_s(each, "a"), actual_s=true_s)

    assert predicted_finish_s(each, "a") == pytest.approx(true_s, rel=0.01)
    assert each.drift("a") == pytest.approx(factor, rel=0.01)


@pytest.mark.parametrize("actual_s", [math.nan, math.inf, 0.0, -1.0])
def test_a_duration_that_makes_no_sense_teaches_nothing(actual_s: float) -> None:
    each = fleet(instance("a"))
    each.observe("a", predicted_s=1.0, actual_s=actual_s)
    each.observe("a", predicted_s=0.0, actual_s=1.0)

    assert each.drift("a") == 1.0


@given(st.lists(st.floats(1e-9, 1e9), max_size=100))
def test_drift_stays_within_bounds(durations: list[float]) -> None:
    each = fleet(instance("a"))
    for actual_s in durations:
        each.observe("a", predicted_s=1.0, actual_s=actual_s)

    assert 1 / 8 <= each.drift("a") <= 8


class Ledger(RuleBasedStateMachine):
    """Whatever is reserved and released in whatever order, the ledger adds up."""

    @initialize()
    def start(self) -> None:
        self.fleet = fleet(instance("a"), instance("b"))
        self.held: dict[str, tuple[str, float]] = {}
        self.num_made = 0

    @rule(instance_id=st.sampled_from("ab"), service_s=st.floats(0.0, 1e6))
    def reserve(self, instance_id: str, service_s: float) -> None:
        request_id = f"r{self.num_made}"
        self.num_made += 1
        self.fleet.reserve(request_id, candidate(instance_id, prefill_s=service_s))
        self.held[request_id] = (instance_id, service_s)

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        if self.held:
            request_id = data.draw(st.sampled_from(sorted(self.held)))
            instance_id, _ = self.held.pop(request_id)
            self.fleet.release(request_id, instance_id)
            self.fleet.release(request_id, instance_id)

    @invariant()
    def nothing_is_negative_and_all_is_counted(self) -> None:
        for instance_id in "ab":
            here = [s for i, s in self.held.values() if i == instance_id]
            assert self.fleet.num_outstanding(instance_id) == len(here)
            assert self.fleet.outstanding_s(instance_id) >= 0.0
            assert self.fleet.outstanding_s(instance_id) == pytest.approx(sum(here), abs=1e-3)
            if not here:
                assert self.fleet.outstanding_s(instance_id) == 0.0
        assert self.fleet.num_outstanding() == len(self.held)


TestLedger = Ledger.TestCase
