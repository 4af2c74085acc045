"""Who may start beside others' calls, beside other models, and as time passes."""

import math
from dataclasses import replace

import pytest

from tests.builders import dispatcher, instance, outcome, stage_request
from vllm_workflow.core import policy_names
from vllm_workflow.core.admissions import _MAX_MODELS
from vllm_workflow.core.dispatcher import Dispatcher
from vllm_workflow.core.errors import OverloadedError
from vllm_workflow.core.fleet import Instance
from vllm_workflow.core.tenants import TenantsConfig
from vllm_workflow.core.types import Decision, StageRequest

POLICY = policy_names.parse("workflow")


def brain(*instances: Instance) -> Dispatcher:
    return dispatcher(*instances, config=POLICY)


def end(each: Dispatcher, decision: Decision, *, e2el_s: float = 0.1) -> None:
    chosen = decision.chosen.instance_id
    each.settle(outcome(decision.request_id, chosen, e2el_s=e2el_s))


def first_call(number: int, now: float, model: str = "") -> StageRequest:
    return stage_request(
        f"{model}{number}",
        workflow_id=f"{model}-run-{number}",
        model=model,
        arrival_time=now,
        run_arrival_time=now,
        deadline=now + 30.0,
        expected_output_tokens=300.0,
        rest_s=10.0,
    )


def crowded(each: Dispatcher, model: str = "") -> list[Decision]:
    """Let runs of several calls come until one has to wait."""
    decisions = list[Decision]()
    for number in range(1_000):
        decision = each.submit(first_call(number, 0.0, model), now=0.0)
        if decision is None:
            return decisions
        decisions.append(decision)
    raise AssertionError("no run ever waits")


def test_a_call_for_which_others_leave_no_room_goes_where_no_call_of_ours_is() -> None:
    each = brain(instance("a", num_kv_tokens=10_000))
    each.report("a", num_others=1, kv_share=0.15)

    big = each.submit(stage_request("big", num_prompt_tokens=9_000), now=0.0)

    assert big is not None
    assert big.chosen.queue_s == 0.0
    assert each.submit(stage_request("small"), now=0.0) is None


def test_where_others_take_every_seat_no_call_starts() -> None:
    each = brain(instance("a", max_num_seqs=2, num_kv_tokens=10_000))
    each.report("a", num_others=2, kv_share=0.15)

    assert each.submit(stage_request("ours"), now=0.0) is None
    each.report("a", num_others=1, kv_share=0.15)

    assert len(each.poll(1.0)) == 1


def test_a_call_waits_for_the_end_of_ours_however_soon_others_may_end() -> None:
    each = brain(instance("a", num_kv_tokens=10_000))
    each.report("a", num_others=1, kv_share=0.15)
    running = each.submit(stage_request("running", expected_output_tokens=1_000.0), now=0.0)
    assert running is not None
    assert each.submit(stage_request("big", num_prompt_tokens=9_000, deadline=9.0), now=0.0) is None

    shorter = each.submit(stage_request("shorter", expected_output_tokens=600.0), now=0.0)
    longer = each.submit(stage_request("longer", expected_output_tokens=1_200.0), now=0.0)

    assert running.chosen.finish_s > 4.0
    assert shorter is not None
    assert shorter.chosen.finish_s > 2.0  # within which others' calls may have ended
    assert longer is None
    end(each, shorter)
    end(each, running)
    assert [d.request_id for d in each.poll(5.0)] == ["big"]


def test_a_run_that_waits_begins_when_one_that_makes_no_more_calls_is_given_up() -> None:
    each = brain(instance("a", max_num_seqs=5_000))
    decisions = crowded(each)
    assert each.waiting.num_held == 1
    for decision in decisions[:-1]:
        end(each, decision, e2el_s=20.0)
    assert each.poll(20.0) == []

    until = each.waiting.held_until

    assert 20.0 < until < 100.0
    assert each.poll(math.nextafter(until, 0.0)) == []
    times = list[float]()
    while each.waiting.num_held and len(times) < len(decisions):
        times.append(each.waiting.held_until)
        each.poll(times[-1])
    assert each.waiting.num_held == 0
    assert each.waiting.held_until == math.inf
    assert times == sorted(set(times))


def test_calls_of_another_model_do_not_keep_runs_from_an_idle_instance() -> None:
    each = brain(instance("a", models=("a",), max_num_seqs=5_000), instance("b", models=("b",)))
    assert each.submit(first_call(0, 0.0, "b"), now=0.0) is not None
    decisions = crowded(each, "a")

    for decision in decisions:
        end(each, decision, e2el_s=20.0)

    assert len(each.poll(20.0)) == 1


def queued_behind_many(each: Dispatcher) -> list[str]:
    """What starts on b's instance while sixteen calls do not fit on a's."""
    assert each.submit(stage_request("a0", model="a", num_prompt_tokens=9_000), now=0.0)
    running = each.submit(stage_request("b0", model="b"), now=0.0)
    assert running is not None
    for number in range(1, 17):
        large = stage_request(f"a{number}", model="a", num_prompt_tokens=5_000, deadline=900.0)
        assert each.submit(large, now=0.1) is None
    assert each.submit(stage_request("b1", model="b", deadline=5_000.0), now=0.2) is None
    end(each, running)
    return [d.request_id for d in each.poll(1.0)]


def test_calls_of_a_model_that_do_not_fit_do_not_hide_those_of_another() -> None:
    two = (
        instance("A", models=("a",), num_kv_tokens=10_000),
        instance("B", models=("b",), max_num_seqs=1),
    )

    assert queued_behind_many(brain(*two)) == ["b1"]
    tenants = dispatcher(*two, config=POLICY, tenants=TenantsConfig())
    assert queued_behind_many(tenants) == ["b1"]


def test_what_is_kept_of_models_is_bounded_however_many_clients_name() -> None:
    each = brain(instance("a"))
    under_way = each.submit(first_call(0, 0.0, "first"), now=0.0)
    assert under_way is not None

    for number in range(3 * _MAX_MODELS):
        call = stage_request(f"r{number}", model=f"m{number}", deadline=1e4)
        decision = each.submit(call, now=0.1 * number)
        assert decision is not None
        end(each, decision)

    assert len(each.waiting.paces) == _MAX_MODELS
    assert each.waiting.paces["first"].num_runs == 1


def test_only_the_first_call_of_a_run_is_refused() -> None:
    config = replace(POLICY, admission="reject", max_hold_share=0.0)
    each = dispatcher(instance("a", max_num_seqs=5_000), config=config)
    number = len(crowded(each))
    first = first_call(number, 0.0)
    second = first._replace(request_id="second")
    assert each.submit(second, now=1.0) is None

    each.waiting.check(second)

    with pytest.raises(OverloadedError, match="1 wait to begin"):
        each.waiting.check(first)
