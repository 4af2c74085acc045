"""Runs that cannot be on time, and runs that wait to begin so that others are."""

from dataclasses import replace

import pytest

from tests.builders import instance, stage_request
from tests.core.binding_builders import LATE, RELEGATING, brain, end
from vllm_workflow.core.config import PolicyConfig
from vllm_workflow.core.dispatcher import Dispatcher
from vllm_workflow.core.errors import OverloadedError
from vllm_workflow.core.types import Decision


def test_a_run_that_cannot_be_on_time_waits_for_those_that_can() -> None:
    each = brain(instance("a", max_num_seqs=1), config=RELEGATING)
    running = each.submit(stage_request("running"), now=0.0)
    assert running is not None
    each.submit(stage_request("hopeless", deadline=0.5, rest_s=90.0), now=0.1)
    each.submit(stage_request("hopeful", deadline=90.0), now=0.2)

    end(each, running)
    (first,) = each.poll(1.0)
    end(each, first)
    (second,) = each.poll(2.0)

    assert [first.request_id, second.request_id] == ["hopeful", "hopeless"]


def test_a_call_whose_time_runs_out_while_it_waits_is_relegated() -> None:
    each = brain(instance("a", max_num_seqs=1), config=RELEGATING)
    running = each.submit(stage_request("running"), now=0.0)
    assert running is not None
    each.submit(stage_request("first", deadline=20.0), now=0.1)
    each.submit(stage_request("second", deadline=90.0), now=0.2)

    end(each, running)

    assert [d.request_id for d in each.poll(30.0)] == ["second"]
    assert len(each.waiting) == 1
    assert len(each.waiting.relegated) == 1


def test_a_relegated_call_gets_its_share_however_many_others_wait() -> None:
    config = PolicyConfig(late_binding=True, relegate=True, relegated_share=0.25)
    each = brain(instance("a", max_num_seqs=1), config=config)
    running = each.submit(stage_request("running"), now=0.0)
    each.submit(stage_request("hopeless", deadline=0.0), now=0.0)
    order = []
    for number in range(12):
        each.submit(stage_request(f"r{number}", deadline=900.0), now=0.0)
        assert running is not None
        end(each, running)
        (running,) = each.poll(0.0)
        order.append(running.request_id)

    assert order.index("hopeless") <= 4


def crowded(each: Dispatcher) -> list[Decision]:
    """Let runs that need little come until one has to wait; its decision is missing."""
    decisions = list[Decision]()
    for number in range(1_000):
        first = stage_request(
            f"r{number}",
            workflow_id=f"run-{number}",
            run_arrival_time=0.0,
            deadline=0.4,
            expected_output_tokens=60.0,
        )
        decision = each.submit(first, now=0.0)
        if decision is None:
            return decisions
        decisions.append(decision)
    raise AssertionError("no run ever waits")


def test_runs_wait_to_begin_when_more_cannot_be_on_time_though_there_are_seats() -> None:
    each = brain(instance("a", max_num_seqs=5_000), config=RELEGATING)

    decisions = crowded(each)

    assert len(decisions) >= 10
    assert each.waiting.num_held == 1
    assert each.fleet.has_room()


def test_a_run_under_way_never_waits_to_begin() -> None:
    each = brain(instance("a", max_num_seqs=5_000), config=RELEGATING)
    crowded(each)

    again = stage_request("again", workflow_id="run-0", run_arrival_time=0.0, deadline=0.4)
    forgotten = stage_request("x", workflow_id="x", deadline=0.4, attained_s=1.0)

    assert each.submit(again, now=0.01) is not None
    assert each.submit(forgotten, now=0.01) is not None


def test_a_call_without_a_deadline_never_waits_to_begin() -> None:
    each = brain(instance("a", max_num_seqs=5_000), config=RELEGATING)
    crowded(each)

    assert each.submit(stage_request("ordinary"), now=0.0) is not None


def test_runs_that_wait_begin_as_others_end() -> None:
    each = brain(instance("a", max_num_seqs=5_000), config=RELEGATING)
    decisions = crowded(each)

    for decision in decisions:
        end(each, decision)

    assert len(each.poll(0.1)) == 1
    assert each.waiting.num_held == 0


def test_a_run_that_would_wait_too_long_is_refused_if_so_configured() -> None:
    config = replace(RELEGATING, admission="reject", max_hold_share=0.0)
    each = brain(instance("a", max_num_seqs=5_000), config=config)
    decisions = crowded(each)
    last = f"r{len(decisions)}"
    (held,) = each.waiting.by_arrival()

    with pytest.raises(OverloadedError, match="runs are under way, 1 wait to begin") as refused:
        each.waiting.check(held.request)

    assert refused.value.retry_after_s > 0.0
    assert each.withdraw(last)
    assert len(each.waiting) == 0


def test_no_run_is_refused_unless_so_configured() -> None:
    each = brain(instance("a", max_num_seqs=5_000), config=RELEGATING)
    crowded(each)
    (held,) = each.waiting.by_arrival()

    each.waiting.check(held.request)


def test_only_runs_that_have_not_begun_are_refused() -> None:
    config = replace(RELEGATING, admission="reject", max_hold_share=0.0)
    each = brain(instance("a", max_num_seqs=1), config=config)
    begun = stage_request("first", workflow_id="w", deadline=1.0)
    assert each.submit(begun, now=0.0) is not None
    then = stage_request("second", workflow_id="w", deadline=1.0)
    assert each.submit(then, now=0.0) is None

    each.waiting.check(then)


def test_under_another_policy_calls_that_waited_to_begin_go_on_waiting() -> None:
    each = brain(instance("a", max_num_seqs=5_000), config=RELEGATING)
    crowded(each)

    each.swap(LATE, now=0.1)

    assert each.waiting.num_held == 0
    assert len(each.poll(0.1)) == 1
