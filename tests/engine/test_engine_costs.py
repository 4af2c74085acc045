"""When a preemption pays, and who goes behind whom once it is too late."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.engine.engine_builders import add, build_request, fill_seats, ids, run_step
from vllm_workflow.core.preemption import PreemptionCosts
from vllm_workflow.engine.slack_order import MAX_PUT_OFF

Make = Callable[..., Any]


class SetClock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def time(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return self.now


def costs(scheduler: Any) -> PreemptionCosts:
    return scheduler._order._preemption.costs


def measured(scheduler: Any, *, per_token_s: float, wait_s: float) -> None:
    """Have the scheduler know what a token costs, and how often a call ends."""
    costs(scheduler).note_prefill(1e6 * per_token_s, 10**6)
    now = scheduler._order._clock.monotonic()
    costs(scheduler).note_departure(now - wait_s)
    costs(scheduler).note_departure(now)


def calls(*names: str, now: float, **wf: Any) -> list[Any]:
    return [build_request(name, arrival_time=now, **wf) for name in names]


@pytest.mark.parametrize(("wait_s", "taken"), [(15.0, False), (40.0, True)])
def test_a_victim_falls_if_that_saves_twice_the_time_of_computing_it_again(
    make_scheduler: Make, wait_s: float, taken: bool
) -> None:
    scheduler = make_scheduler(num_seats=1)  # no prefix cache: all 16 tokens are lost
    fill_seats(scheduler, num_seats=1)
    measured(scheduler, per_token_s=1.0, wait_s=wait_s)
    costs(scheduler)._max_waste_s = 100.0
    add(scheduler, build_request("urgent", wf_budget_ms=1_000))

    run_step(scheduler)

    assert (ids(scheduler.running) == ["urgent"]) is taken
    assert scheduler._order.stats.recomputed_s == pytest.approx(16.0 if taken else 0.0, rel=0.1)


def test_what_the_prefix_cache_keeps_costs_nothing(make_scheduler: Make) -> None:
    scheduler = make_scheduler(num_seats=1, prefix_caching=True)
    fill_seats(scheduler, num_seats=1)
    measured(scheduler, per_token_s=1.0, wait_s=15.0)
    add(scheduler, build_request("urgent", wf_budget_ms=1_000))

    run_step(scheduler)

    assert ids(scheduler.running) == ["urgent"]


def test_no_seat_is_taken_for_which_the_cache_would_lose_the_victim_s_blocks(
    make_scheduler: Make,
) -> None:
    """13 of 19 blocks are the victim's, and the urgent call needs 12."""
    scheduler = make_scheduler(num_seats=1, num_blocks=20, prefix_caching=True)
    add(scheduler, build_request("rich", num_tokens=200, token_id=2, wf_budget_ms=60_000))
    run_step(scheduler)
    measured(scheduler, per_token_s=1.0, wait_s=15.0)
    add(scheduler, build_request("urgent", num_tokens=176, wf_budget_ms=1_000))

    run_step(scheduler)

    assert ids(scheduler.running) == ["rich"]


def test_the_calls_of_one_run_lose_no_more_than_its_bound_together(make_scheduler: Make) -> None:
    policy = {"preempt_waste_s": 40.0, "preempt_cooldown_s": 0.0}
    scheduler = make_scheduler(num_seats=3, policy=policy)
    fill_seats(scheduler, num_seats=3, wf_id="run", wf_budget_ms=60_000)
    measured(scheduler, per_token_s=1.0, wait_s=1_000.0)
    add(scheduler, *(build_request(f"u{i}", wf_id=f"u{i}", wf_budget_ms=1_000) for i in range(3)))

    run_step(scheduler)

    # 16 tokens of each of the three: 48 s would be too much.
    assert ids(scheduler.running) == ["batch-0", "u0", "u1"]


@pytest.mark.parametrize(("wait_s", "taken"), [(20.0, 0), (50.0, 2)])
def test_blocks_are_taken_from_several_at_a_price_that_pays_for_all_or_from_none(
    make_scheduler: Make, wait_s: float, taken: int
) -> None:
    """Of 31 blocks the two hold 20, the urgent call needs 20: 9 more than there are."""
    scheduler = make_scheduler(num_seats=8, num_blocks=32, prefix_caching=True)
    sizes = {"rich": 96, "poor": 224}
    add(
        scheduler,
        *(
            build_request(name, num_tokens=n, token_id=i, wf_budget_ms=90_000 - 1_000 * i)
            for i, (name, n) in enumerate(sizes.items(), 2)
        ),
    )
    run_step(scheduler)
    measured(scheduler, per_token_s=0.1, wait_s=wait_s)
    costs(scheduler)._max_waste_s = 1_000.0
    add(scheduler, build_request("urgent", num_tokens=304, token_id=9, wf_budget_ms=1_000))

    for _ in range(3):
        run_step(scheduler)

    assert scheduler._order.stats.preemptions == {"seat": 0, "kv": taken}
    assert (ids(scheduler.waiting) == ["urgent"]) is (taken == 0)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_price_of_a_token_is_measured_on_the_steps(
    make_scheduler: Make, asynchronous: bool
) -> None:
    clock = SetClock()
    scheduler = make_scheduler(clock=clock, asynchronous=asynchronous)
    add(scheduler, *calls("a", now=0.0, num_tokens=101, max_tokens=9, wf_budget_ms=60_000))
    output = scheduler.schedule()
    clock.now = 2.0
    scheduler._order.on_output(output)

    assert costs(scheduler).recompute_s(50) == pytest.approx(1.0)


def test_a_step_without_prompt_tokens_says_nothing_of_their_price(make_scheduler: Make) -> None:
    clock = SetClock()
    scheduler = make_scheduler(clock=clock)
    add(scheduler, *calls("a", now=0.0, num_tokens=101, max_tokens=9, wf_budget_ms=60_000))
    run_step(scheduler)
    before = costs(scheduler).recompute_s(50)
    clock.now = 100.0
    run_step(scheduler)

    assert costs(scheduler).recompute_s(50) == before


def test_time_between_ends_of_calls_is_measured_and_aborted_ones_do_not_count(
    make_scheduler: Make,
) -> None:
    from vllm.v1.request import RequestStatus

    clock = SetClock()
    scheduler = make_scheduler(clock=clock, num_seats=4)
    add(scheduler, *calls("a", "b", "c", now=0.0, max_tokens=1, wf_budget_ms=60_000))
    scheduler.finish_requests("c", RequestStatus.FINISHED_ABORTED)
    run_step(scheduler)
    clock.now = 3.0
    add(scheduler, *calls("d", now=3.0, max_tokens=1, wf_budget_ms=60_000))
    run_step(scheduler)

    assert costs(scheduler).wait_s(3.0) == pytest.approx(1.5)  # ends at 0, 0 and 3


# --- calls that can no longer be on time


def test_a_call_that_became_late_goes_behind_those_that_can_be_on_time(
    make_scheduler: Make,
) -> None:
    clock = SetClock()
    scheduler = make_scheduler(clock=clock, num_seats=1)
    add(scheduler, *calls("runs", now=0.0, wf_budget_ms=1_000))
    run_step(scheduler)
    add(scheduler, *calls("late", now=0.0, wf_budget_ms=2_000))
    add(scheduler, *calls("on-time", now=0.0, wf_budget_ms=60_000))
    assert ids(scheduler.waiting) == ["late", "on-time"]

    clock.now = 2.5
    run_step(scheduler)

    assert ids(scheduler.waiting) == ["on-time", "late"]
    assert scheduler._order.stats.put_off == 1


def test_one_step_lets_no_more_than_so_many_late_calls_step_back(make_scheduler: Make) -> None:
    clock = SetClock()
    scheduler = make_scheduler(clock=clock, num_seats=1)
    add(scheduler, *calls("runs", now=0.0, wf_budget_ms=600_000))
    run_step(scheduler)
    names = [f"late-{i}" for i in range(MAX_PUT_OFF + 5)]
    add(scheduler, *calls(*names, now=0.0, wf_budget_ms=2_000))
    add(scheduler, *calls("on-time", now=0.0, wf_budget_ms=60_000))

    clock.now = 2.5
    run_step(scheduler)
    after_one = scheduler._order.stats.put_off
    run_step(scheduler)

    assert (after_one, scheduler._order.stats.put_off) == (MAX_PUT_OFF, MAX_PUT_OFF + 5)
    assert ids(scheduler.waiting)[0] == "on-time"


def test_a_late_call_no_longer_keeps_urgent_ones_behind_it_from_a_seat(
    make_scheduler: Make,
) -> None:
    clock = SetClock()
    scheduler = make_scheduler(clock=clock, num_seats=1)
    add(scheduler, *calls("rich", now=0.0, wf_budget_ms=600_000))
    run_step(scheduler)
    add(scheduler, *calls("late", now=0.0, wf_budget_ms=0))
    add(scheduler, *calls("urgent", now=0.0, wf_budget_ms=4_000))
    clock.now = 1.0

    run_step(scheduler)

    assert ids(scheduler.running) == ["urgent"]


def test_a_late_call_ages_and_none_that_comes_goes_before_it_for_ever(make_scheduler: Make) -> None:
    clock = SetClock()
    scheduler = make_scheduler(clock=clock, num_seats=1, policy={"late_patience_s": 100.0})
    add(scheduler, *calls("runs", now=0.0, wf_budget_ms=1_000))
    run_step(scheduler)
    add(scheduler, *calls("late", now=0.0, wf_budget_ms=1_000))
    clock.now = 2.0
    run_step(scheduler)
    clock.now = 99.0
    add(scheduler, *calls("before", now=99.0, wf_budget_ms=1_500))
    add(scheduler, *calls("after", now=99.0, wf_budget_ms=3_000))

    run_step(scheduler)

    assert ids(scheduler.waiting) == ["before", "late", "after"]


def test_a_call_that_has_run_is_late_only_when_its_deadline_has_passed(
    make_scheduler: Make,
) -> None:
    """How much of it is left is not known."""
    clock = SetClock()
    scheduler = make_scheduler(clock=clock)
    slow = {"wf_budget_ms": 10_000, "wf_service_ms": 8_000}
    add(scheduler, *calls("begun", now=0.0, **slow))
    run_step(scheduler)
    call = scheduler._order.calls.get("begun")

    assert not scheduler._order.calls.put_off(call, 5.0)
    assert scheduler._order.calls.put_off(call, 10.5)


@pytest.mark.parametrize(
    "policy", [{"ordering": "deadline"}, {"late_patience_s": 0.0}, "hexgen"], ids=str
)
def test_other_orders_are_left_as_published(make_scheduler: Make, policy: Any) -> None:
    clock = SetClock()
    scheduler = make_scheduler(clock=clock, num_seats=1, policy=policy)
    add(scheduler, *calls("runs", now=0.0, wf_budget_ms=1_000))
    run_step(scheduler)
    add(scheduler, *calls("late", now=0.0, wf_budget_ms=0))
    add(scheduler, *calls("on-time", now=0.0, wf_budget_ms=60_000))
    clock.now = 2.5

    run_step(scheduler)

    assert ids(scheduler.waiting) == ["late", "on-time"]


def test_by_priority_a_late_call_stays_before_those_of_lower_priority(
    make_scheduler: Make,
) -> None:
    clock = SetClock()
    scheduler = make_scheduler(clock=clock, num_seats=1, scheduling_policy="priority")
    add(scheduler, *calls("runs", now=0.0, priority=-1, wf_budget_ms=1_000))
    run_step(scheduler)
    add(scheduler, *calls("late", now=0.0, priority=0, wf_budget_ms=0))
    add(scheduler, *calls("same", now=0.0, priority=0, wf_budget_ms=60_000))
    add(scheduler, *calls("lower", now=0.0, priority=1, wf_budget_ms=60_000))
    clock.now = 1.0

    run_step(scheduler)

    assert ids(scheduler.waiting) == ["same", "late", "lower"]
