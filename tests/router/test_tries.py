"""Where a call that failed may go on, and when."""

from __future__ import annotations

import math

import pytest

from vllm_workflow.router.attempt import Refusal
from vllm_workflow.router.headers import Headers
from vllm_workflow.router.tries import MAX_REASONS, Tries


class Instances:
    def __init__(self) -> None:
        self.times_back = {"a": 0, "b": 0}

    def tries(self, give_up_time: float | None = None) -> Tries:
        return Tries(lambda: give_up_time, 60.0, self.times_back.__getitem__)


def refusal(status: int, **headers: str) -> Refusal:
    named = Headers.of((name.replace("_", "-"), value) for name, value in headers.items())
    return Refusal("a", status, named, b"")


def test_one_that_lost_a_call_is_asked_again_after_a_pause_that_grows() -> None:
    tries = Instances().tries()
    pauses, now = [], 0.0
    for _ in range(7):
        tries.lost("a", "refused", now)
        assert tries.excluded(now) == ["a"]
        pauses.append(tries.next_time - now)
        now = tries.next_time
        assert tries.excluded(now) == []

    assert pauses == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0])
    assert tries.may_go_on


def test_one_that_comes_back_and_is_lost_again_thousands_of_times_is_asked_again() -> None:
    tries = Instances().tries()
    for now in range(3_000):
        tries.lost("a", "refused", now)

    assert tries.next_time == 2_999 + 2.0
    assert len(tries.reasons) == MAX_REASONS


def test_a_stale_connection_costs_no_pause_and_no_try_but_the_next_one_is_new() -> None:
    tries = Instances().tries()
    tries.lost("a", "closed", 0.0)

    assert tries.fresh_connection
    assert tries.excluded(0.0) == []
    for _ in range(2):
        tries.lost("a", "disconnected", 0.0)
        assert tries.may_go_on
    tries.lost("a", "disconnected", 0.0)
    assert not tries.may_go_on


def test_a_connection_that_was_closed_by_a_process_that_has_gone_since_was_not_stale() -> None:
    tries = Instances().tries()
    for instance_id in ("a", "b", "a"):
        assert tries.may_go_on
        tries.lost(instance_id, "closed", 0.0)
        tries.lost(instance_id, "refused", 0.0)

    assert not tries.may_go_on


@pytest.mark.parametrize("status", [500, 502, 504, 404])
def test_one_that_failed_at_the_call_is_asked_again_when_it_has_been_away(status: int) -> None:
    instances = Instances()
    tries = instances.tries()
    tries.refused(refusal(status), 0.0, is_risky=status == 500)
    assert tries.excluded(1e9) == ["a"]
    assert tries.is_hopeless_on("a")
    assert tries.next_time == math.inf

    instances.times_back["a"] += 1
    assert tries.excluded(0.0) == []
    assert not tries.is_hopeless_on("a")


@pytest.mark.parametrize(("asked", "pause_s"), [("3", 3.0), ("600", 5.0), ("soon", 0.1)])
def test_a_full_queue_is_asked_again_when_it_says_so_within_bounds(
    asked: str, pause_s: float
) -> None:
    tries = Instances().tries()
    for _ in range(10):
        tries.refused(refusal(503), 0.0, is_risky=False)
    assert tries.may_go_on

    tries = Instances().tries()
    tries.refused(refusal(503, Retry_After=asked), 0.0, is_risky=False)
    assert tries.next_time == pytest.approx(pause_s)


def test_a_call_without_a_deadline_waits_from_when_it_is_left_without_an_instance() -> None:
    tries = Instances().tries()

    assert tries.give_up_time(100.0) == 160.0
    assert tries.give_up_time(150.0) == 160.0
    tries.lost("a", "refused", 150.0)
    assert tries.give_up_time(155.0) == 160.0
    tries.lost("a", "hung", 900.0)  # it had an instance for long
    assert tries.give_up_time(900.0) == 960.0
    assert Instances().tries(give_up_time=7.0).give_up_time(100.0) == 7.0
