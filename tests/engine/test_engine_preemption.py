import time
from collections.abc import Callable
from typing import Any

import pytest
from vllm.v1.request import RequestStatus

from tests.engine.engine_builders import add, build_request, fill_seats, ids, run_step
from vllm_workflow.engine.preemption import MAX_PREEMPTIONS
from vllm_workflow.engine.queue import OrderedRequestQueue

Make = Callable[..., Any]


def test_an_urgent_call_takes_a_seat_in_the_same_step(make_scheduler: Make) -> None:
    scheduler = make_scheduler(num_seats=2)
    fill_seats(scheduler)
    add(scheduler, build_request("urgent", wf_budget_ms=1_000))

    output = run_step(scheduler)

    assert "urgent" in output.num_scheduled_tokens
    assert scheduler._order.stats.preemptions == {"seat": 1, "kv": 0}
    assert ids(scheduler.waiting) == ["batch-1"]


def test_the_victim_is_the_call_with_most_slack(make_scheduler: Make) -> None:
    scheduler = make_scheduler(num_seats=3)
    add(
        scheduler,
        build_request("richest", wf_budget_ms=90_000),
        build_request("rich", wf_budget_ms=60_000),
        build_request("poor", wf_budget_ms=10_000),
    )
    run_step(scheduler)
    add(scheduler, build_request("urgent", wf_budget_ms=1_000))

    run_step(scheduler)

    assert ids(scheduler.waiting) == ["richest"]
    assert ids(scheduler.running) == ["poor", "rich", "urgent"]


def test_the_victim_runs_again_and_loses_no_token(make_scheduler: Make) -> None:
    scheduler = make_scheduler(num_seats=2)
    victim = fill_seats(scheduler, wf_budget_ms=60_000)[1]
    for _ in range(5):
        run_step(scheduler)
    add(scheduler, build_request("urgent", wf_budget_ms=1_000, max_tokens=3))
    for _ in range(100):
        run_step(scheduler)

    assert victim.num_preemptions == 1
    assert victim.status == RequestStatus.FINISHED_LENGTH_CAPPED
    assert victim.num_output_tokens == victim.max_tokens


@pytest.mark.parametrize(
    "urgent",
    [{}, {"wf_budget_ms": 20_000}, {"wf_id": "run"}],
    ids=["ordinary", "with slack", "without deadline"],
)
def test_a_call_that_is_not_urgent_waits(make_scheduler: Make, urgent: dict[str, Any]) -> None:
    scheduler = make_scheduler()
    fill_seats(scheduler)
    add(scheduler, build_request("waits", **urgent))

    run_step(scheduler)

    assert ids(scheduler.waiting) == ["waits"]


@pytest.mark.parametrize("budget_ms", [0, -5_000])
def test_a_call_that_is_late_already_takes_no_seat(make_scheduler: Make, budget_ms: int) -> None:
    scheduler = make_scheduler()
    fill_seats(scheduler)
    add(scheduler, build_request("late", wf_budget_ms=budget_ms))

    run_step(scheduler)

    assert ids(scheduler.waiting) == ["late"]


def test_an_old_call_without_deadline_takes_no_seat(make_scheduler: Make) -> None:
    scheduler = make_scheduler(policy={"patience_s": 1.0})
    fill_seats(scheduler)
    add(scheduler, build_request("old", arrival_time=time.time() - 100))

    run_step(scheduler)

    assert ids(scheduler.waiting) == ["old"]


def test_preempt_false_only_orders(make_scheduler: Make) -> None:
    scheduler = make_scheduler(policy={"preempt": False})
    fill_seats(scheduler)
    add(scheduler, build_request("urgent", wf_budget_ms=1_000))

    run_step(scheduler)

    assert ids(scheduler.waiting) == ["urgent"]
    assert isinstance(scheduler.waiting, OrderedRequestQueue)


@pytest.mark.parametrize(("victim_ms", "taken"), [(4_000, False), (6_500, False), (9_000, True)])
def test_a_victim_is_not_urgent_and_has_a_margin(
    make_scheduler: Make, victim_ms: int, taken: bool
) -> None:
    scheduler = make_scheduler(num_seats=1, policy={"urgent_slack_s": 5.0, "preempt_margin_s": 4.0})
    fill_seats(scheduler, num_seats=1, wf_budget_ms=victim_ms)
    add(scheduler, build_request("urgent", wf_budget_ms=4_500))

    run_step(scheduler)

    assert (ids(scheduler.running) == ["urgent"]) is taken


def test_a_call_that_is_just_running_again_is_left_alone(make_scheduler: Make) -> None:
    scheduler = make_scheduler(num_seats=1, policy={"preempt_cooldown_s": 1_000.0})
    fill_seats(scheduler, num_seats=1)
    add(scheduler, build_request("urgent-1", wf_budget_ms=1_000, max_tokens=1))
    run_step(scheduler)
    run_step(scheduler)
    assert ids(scheduler.running) == ["batch-0"]
    add(scheduler, build_request("urgent-2", wf_budget_ms=1_000))

    run_step(scheduler)

    assert ids(scheduler.waiting) == ["urgent-2"]


def test_no_call_loses_its_seat_forever(make_scheduler: Make) -> None:
    scheduler = make_scheduler(num_seats=1, policy={"preempt_cooldown_s": 0.0})
    (victim,) = fill_seats(scheduler, num_seats=1)
    for i in range(MAX_PREEMPTIONS + 3):
        add(scheduler, build_request(f"urgent-{i}", wf_budget_ms=1_000, max_tokens=1))
        run_step(scheduler)
        run_step(scheduler)

    assert victim.num_preemptions == MAX_PREEMPTIONS


def test_urgent_calls_do_not_preempt_each_other(make_scheduler: Make) -> None:
    scheduler = make_scheduler(num_seats=2)
    add(scheduler, *(build_request(f"u{i}", wf_budget_ms=1_000 + i) for i in range(6)))

    for _ in range(10):
        run_step(scheduler)

    assert scheduler._order.stats.preemptions == {"seat": 0, "kv": 0}


def test_nobody_is_preempted_for_a_seat_that_another_would_take(make_scheduler: Make) -> None:
    """Under fcfs order the victim, put back in front, would take its seat again."""
    scheduler = make_scheduler(num_seats=1, policy={"ordering": "fcfs"})
    fill_seats(scheduler, num_seats=1)
    add(scheduler, build_request("urgent", wf_budget_ms=1_000))

    run_step(scheduler)

    assert ids(scheduler.running) == ["batch-0"]


def test_a_more_important_call_is_no_victim(make_scheduler: Make) -> None:
    scheduler = make_scheduler(num_seats=1, scheduling_policy="priority")
    add(scheduler, build_request("important", priority=-1, wf_budget_ms=90_000))
    run_step(scheduler)
    add(scheduler, build_request("urgent", priority=0, wf_budget_ms=1_000))

    run_step(scheduler)

    assert ids(scheduler.running) == ["important"]


def test_a_free_seat_is_taken_without_preemption(make_scheduler: Make) -> None:
    scheduler = make_scheduler(num_seats=3)
    fill_seats(scheduler, num_seats=2)
    add(scheduler, build_request("urgent", wf_budget_ms=1_000))

    run_step(scheduler)

    assert scheduler._order.stats.preemptions == {"seat": 0, "kv": 0}
    assert len(scheduler.running) == 3


def test_several_urgent_calls_take_several_seats_at_once(make_scheduler: Make) -> None:
    scheduler = make_scheduler(num_seats=4)
    fill_seats(scheduler, num_seats=4)
    add(scheduler, *(build_request(f"u{i}", wf_budget_ms=1_000) for i in range(3)))

    run_step(scheduler)

    assert set(ids(scheduler.running)) == {"batch-0", "u0", "u1", "u2"}


def test_an_urgent_call_takes_kv_blocks_one_step_after_it_found_none(make_scheduler: Make) -> None:
    # 31 usable blocks: two batch requests of 10 blocks leave 11 and grow; urgent needs 12.
    scheduler = make_scheduler(num_seats=8, num_blocks=32)
    add(
        scheduler,
        build_request("rich", num_tokens=160, wf_budget_ms=90_000),
        build_request("poor", num_tokens=160, wf_budget_ms=30_000),
    )
    run_step(scheduler)
    add(scheduler, build_request("urgent", num_tokens=190, wf_budget_ms=1_000))

    run_step(scheduler)
    assert ids(scheduler.waiting) == ["urgent"]
    run_step(scheduler)

    assert set(ids(scheduler.running)) == {"poor", "urgent"}
    assert scheduler._order.stats.preemptions == {"seat": 0, "kv": 1}


def test_a_paused_engine_preempts_nobody(make_scheduler: Make) -> None:
    from vllm.v1.core.sched.interface import PauseState

    scheduler = make_scheduler(num_seats=1)
    fill_seats(scheduler, num_seats=1)
    add(scheduler, build_request("urgent", wf_budget_ms=1_000))
    scheduler.set_pause_state(PauseState.PAUSED_NEW)

    run_step(scheduler)

    assert ids(scheduler.running) == ["batch-0"]


# --- prefill cap


def test_prefill_of_calls_with_slack_is_capped_while_urgent_ones_run(make_scheduler: Make) -> None:
    scheduler = make_scheduler(num_seats=4, policy={"prefill_chunk_cap": 64})
    add(scheduler, build_request("urgent", wf_budget_ms=2_000))
    run_step(scheduler)
    add(scheduler, build_request("long", num_tokens=1_000, wf_budget_ms=90_000))

    output = run_step(scheduler)

    assert output.num_scheduled_tokens == {"urgent": 1, "long": 64}
    assert scheduler._order.stats.capped_prefills == 1


def test_prefill_is_not_capped_without_urgent_calls(make_scheduler: Make) -> None:
    scheduler = make_scheduler(num_seats=4, policy={"prefill_chunk_cap": 64})
    add(scheduler, build_request("calm", wf_budget_ms=60_000))
    run_step(scheduler)
    add(scheduler, build_request("long", num_tokens=1_000, wf_budget_ms=90_000))

    assert run_step(scheduler).num_scheduled_tokens["long"] == 1_000


def test_an_urgent_prefill_is_not_capped(make_scheduler: Make) -> None:
    scheduler = make_scheduler(num_seats=4, policy={"prefill_chunk_cap": 64})
    add(scheduler, build_request("urgent", num_tokens=1_000, wf_budget_ms=2_000))

    assert run_step(scheduler).num_scheduled_tokens == {"urgent": 1_000}


def test_no_call_loses_its_blocks_for_one_that_would_not_fit_all_the_same(
    make_scheduler: Make,
) -> None:
    scheduler = make_scheduler(num_seats=8, num_blocks=12)
    poor = build_request("poor", num_tokens=96, wf_budget_ms=2_000)
    rich = build_request("rich", num_tokens=48, wf_budget_ms=60_000)
    add(scheduler, poor, rich)
    run_step(scheduler)
    assert ids(scheduler.running) == ["poor", "rich"]
    add(scheduler, build_request("urgent", num_tokens=128, wf_budget_ms=1_000))

    for _ in range(3):
        run_step(scheduler)

    assert ids(scheduler.waiting) == ["urgent"]
    assert scheduler._order.stats.preemptions == {"seat": 0, "kv": 0}


def test_without_preemption_the_policy_s_own_order_says_who_loses_its_blocks(
    make_scheduler: Make,
) -> None:
    policy = {"ordering": "deadline", "preempt": False}
    scheduler = make_scheduler(policy=policy, num_seats=2, num_blocks=9)
    early = build_request("early", num_tokens=60, wf_budget_ms=10_000)
    # Less slack than the other, but the later deadline: by `deadline` it is the victim.
    late = build_request("late", num_tokens=60, wf_budget_ms=20_000, wf_rest_ms=15_000)
    add(scheduler, late, early)
    for _ in range(8):
        run_step(scheduler)

    assert ids(scheduler.running) == ["early"]
    assert late.status == RequestStatus.PREEMPTED
