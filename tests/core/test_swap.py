from dataclasses import replace

from tests.builders import SLOW, dispatcher, instance, outcome, stage_request
from vllm_workflow.core.config import PolicyConfig
from vllm_workflow.core.dispatcher import Dispatcher
from vllm_workflow.core.events import Event, Swapped
from vllm_workflow.core.replay import replay

FCFS = PolicyConfig(ordering="fcfs", late_binding=True)
EARLIEST_DEADLINE = PolicyConfig(ordering="deadline", late_binding=True)
AT_ONCE = PolicyConfig(dispatch="least-outstanding", ordering="fcfs")


def one_seat(config: PolicyConfig, log: list[Event] | None = None) -> Dispatcher:
    """One seat, which is taken."""
    record = None if log is None else log.append
    brain = dispatcher(instance("a", max_num_seqs=1), config=config, record=record)
    brain.submit(stage_request("first"), now=0.0)
    return brain


def started_next(brain: Dispatcher, ended: str) -> list[str]:
    brain.settle(outcome(ended, "a"))
    return [decision.request_id for decision in brain.poll(1.0)]


def test_calls_that_wait_get_their_place_in_the_new_order() -> None:
    brain = one_seat(FCFS)
    brain.submit(stage_request("early", arrival_time=1.0, deadline=99.0), now=1.0)
    brain.submit(stage_request("urgent", arrival_time=2.0, deadline=9.0), now=2.0)

    brain.swap(EARLIEST_DEADLINE, now=3.0)

    assert started_next(brain, "first") == ["urgent"]
    assert started_next(brain, "urgent") == ["early"]


def test_of_calls_that_are_equal_in_the_new_order_the_one_that_came_first_goes_first() -> None:
    brain = one_seat(EARLIEST_DEADLINE)
    brain.submit(stage_request("late", arrival_time=2.0, deadline=9.0), now=2.0)
    brain.submit(stage_request("early", arrival_time=1.0, deadline=9.0), now=2.0)

    brain.swap(replace(EARLIEST_DEADLINE, patience_s=30.0), now=3.0)

    assert started_next(brain, "first") == ["early"]


def test_calls_in_flight_stay_counted() -> None:
    brain = one_seat(FCFS)

    brain.swap(AT_ONCE, now=1.0)

    assert brain.num_in_flight == 1
    assert brain.fleet.num_outstanding("a") == 1


def test_calls_that_wait_are_not_lost_to_a_policy_that_lets_none_wait() -> None:
    brain = one_seat(FCFS)
    brain.submit(stage_request("waiting", arrival_time=1.0), now=1.0)

    brain.swap(AT_ONCE, now=2.0)

    assert brain.submit(stage_request("new", arrival_time=2.0), now=2.0) is not None
    brain.settle(outcome("new", "a"))
    assert started_next(brain, "first") == ["waiting"]


def test_what_was_learned_of_an_instance_stays() -> None:
    brain = one_seat(FCFS)
    brain.settle(outcome("first", "a", e2el_s=50.0, num_output_tokens=10))
    drift = brain.fleet.drift("a")

    brain.swap(AT_ONCE, now=1.0)

    assert brain.fleet.drift("a") == drift > 1.0


def test_a_swap_is_in_the_log_with_its_fingerprint() -> None:
    log: list[Event] = []

    one_seat(FCFS, log).swap(AT_ONCE, now=4.0)

    assert log[-1] == Swapped(now=4.0, policy=AT_ONCE, fingerprint=AT_ONCE.fingerprint)


def test_a_policy_that_is_tried_on_a_log_decides_after_its_swaps_too() -> None:
    log: list[Event] = []
    brain = one_seat(FCFS, log)
    brain.swap(AT_ONCE, now=1.0)
    brain.submit(stage_request("second", arrival_time=1.0), now=1.0)

    pairs = list(replay(log, PolicyConfig(dispatch="round-robin", preempt=False)))

    assert [again.policy for _, again in pairs if again] == ["round-robin"] * 2


HOLDING = PolicyConfig(ordering="slack", late_binding=True, relegate=True)


def overloaded() -> Dispatcher:
    """Runs that come faster than they end, with calls that take three times what is predicted."""
    brain = dispatcher(instance("a", latency=SLOW, max_num_seqs=4), config=HOLDING)
    running: list[tuple[float, float, str]] = []
    for number in range(400):
        now = 0.05 * number
        while running and min(running)[0] <= now:
            end, begin, request_id = min(running)
            running.remove((end, begin, request_id))
            brain.settle(outcome(request_id, "a", e2el_s=end - begin, num_output_tokens=50))
        call = stage_request(
            f"{number}",
            workflow_id=f"run-{number}",
            workflow="w",
            arrival_time=now,
            run_arrival_time=now,
            deadline=now + 6.0,
            rest_s=1.0,
            expected_output_tokens=50.0,
        )
        for decision in (brain.submit(call, now=now), *brain.poll(now)):
            if decision is not None:
                finish_s = 3.0 * decision.chosen.finish_s
                running.append((now + finish_s, now, decision.request_id))
    return brain


def test_runs_that_wait_to_begin_wait_on_after_a_swap() -> None:
    brain = overloaded()
    held = brain.waiting.num_held
    assert held > 100

    brain.swap(replace(HOLDING, relegation_margin=0.3), now=20.0)
    brain.poll(20.0)

    assert brain.waiting.num_held >= held - 1


def test_what_runs_are_promised_and_need_is_learned_once_from_each() -> None:
    brain = overloaded()
    before = vars(brain.waiting._demands[""]).copy()

    for _ in range(3):
        brain.swap(HOLDING, now=20.0)

    assert vars(brain.waiting._demands[""]) == before
