import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.request_queue import FCFSRequestQueue, PriorityRequestQueue
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import RequestStatus

from tests.engine.engine_builders import add, build_request, fill_seats, ids, run_step
from vllm_workflow.core.errors import ConfigError
from vllm_workflow.engine import compat
from vllm_workflow.engine.queue import OrderedRequestQueue
from vllm_workflow.engine.scheduler import WorkflowScheduler, WorkflowSyncScheduler

Make = Callable[..., Any]


# --- which class


def test_the_one_name_fits_both_modes(make_scheduler: Make) -> None:
    synchronous = make_scheduler(asynchronous=False)
    asynchronous = make_scheduler(asynchronous=True)

    assert type(synchronous) is WorkflowSyncScheduler
    assert not isinstance(synchronous, AsyncScheduler)
    assert type(asynchronous) is WorkflowScheduler
    assert isinstance(asynchronous, AsyncScheduler)


def test_a_subclass_keeps_its_class(make_scheduler: Make) -> None:
    class Mine(WorkflowScheduler):
        pass

    assert type(make_scheduler(cls=Mine, asynchronous=False)) is Mine


# --- without metadata


def test_without_metadata_the_queues_are_vllms_own(make_scheduler: Make) -> None:
    scheduler = make_scheduler()

    add(scheduler, build_request("a"), build_request("b", extra_args={"other": 1}))

    assert type(scheduler.waiting) is FCFSRequestQueue
    assert len(scheduler._order.calls) == 0


def test_a_session_id_alone_changes_nothing(make_scheduler: Make) -> None:
    scheduler = make_scheduler()

    add(scheduler, build_request("a", session_id="s", extra_args={"session_id": "s"}))

    assert type(scheduler.waiting) is FCFSRequestQueue


@pytest.mark.parametrize("scheduling_policy", ["fcfs", "priority"])
def test_without_metadata_every_step_equals_stock(
    make_scheduler: Make, scheduling_policy: str
) -> None:
    outputs = []
    for cls in (Scheduler, WorkflowSyncScheduler):
        scheduler = make_scheduler(
            cls=cls, num_seats=4, num_blocks=12, scheduling_policy=scheduling_policy
        )
        steps = []
        for i in range(60):
            if i < 10:
                request = build_request(
                    str(i),
                    num_tokens=20 + i,
                    max_tokens=30,
                    arrival_time=float(i % 3),
                    priority=i % 2,
                )
                scheduler.add_request(request)
            steps.append(run_step(scheduler).num_scheduled_tokens)
        outputs.append(steps)

    assert outputs[0] == outputs[1]
    assert any(outputs[0])


def test_the_queues_become_vllms_again_once_the_engine_was_empty(make_scheduler: Make) -> None:
    scheduler = make_scheduler(scheduling_policy="priority")
    add(scheduler, build_request("run", wf_budget_ms=1000))
    assert isinstance(scheduler.waiting, OrderedRequestQueue)

    scheduler.finish_requests("run", RequestStatus.FINISHED_ABORTED)
    add(scheduler, build_request("ordinary"))

    assert type(scheduler.waiting) is PriorityRequestQueue
    assert ids(scheduler.waiting) == ["ordinary"]
    assert len(scheduler._order.calls) == 0


# --- order of the waiting


def test_least_slack_waits_in_front(make_scheduler: Make) -> None:
    scheduler = make_scheduler()
    add(
        scheduler,
        build_request("rich", wf_budget_ms=100_000),
        build_request("poor", wf_budget_ms=20_000),
        build_request("busy", wf_budget_ms=50_000, wf_rest_ms=30_000, wf_service_ms=5_000),
        build_request("late", wf_budget_ms=-1),
    )

    assert ids(scheduler.waiting) == ["late", "busy", "poor", "rich"]


def test_a_call_without_deadline_waits_with_patience_and_ages(make_scheduler: Make) -> None:
    scheduler = make_scheduler(policy={"patience_s": 10.0})
    now = time.time()
    add(
        scheduler,
        build_request("young", arrival_time=now),
        build_request("old", arrival_time=now - 9),
        build_request("run", arrival_time=now, wf_budget_ms=5_000),
    )

    assert ids(scheduler.waiting) == ["old", "run", "young"]


def test_requests_that_waited_before_the_first_metadata_keep_their_place(
    make_scheduler: Make,
) -> None:
    scheduler = make_scheduler()
    now = time.time()
    add(scheduler, build_request("a", arrival_time=now), build_request("b", arrival_time=now))

    add(scheduler, build_request("run", wf_budget_ms=100_000, arrival_time=now))

    assert ids(scheduler.waiting) == ["a", "b", "run"]


def test_priority_goes_before_slack_where_vllm_honours_it(make_scheduler: Make) -> None:
    scheduler = make_scheduler(scheduling_policy="priority")
    add(
        scheduler,
        build_request("low", priority=1, wf_budget_ms=0),
        build_request("high-rich", priority=-1, wf_budget_ms=90_000),
        build_request("high-poor", priority=-1, wf_budget_ms=10_000),
    )

    assert ids(scheduler.waiting) == ["high-poor", "high-rich", "low"]


def test_priority_means_nothing_under_fcfs_as_in_vllm(make_scheduler: Make) -> None:
    scheduler = make_scheduler(scheduling_policy="fcfs")
    add(
        scheduler,
        build_request("high", priority=-9, wf_budget_ms=90_000),
        build_request("poor", priority=9, wf_budget_ms=10_000),
    )

    assert ids(scheduler.waiting) == ["poor", "high"]


@pytest.mark.parametrize(
    ("policy", "order"),
    [
        ({"ordering": "fcfs"}, ["first", "second", "third"]),
        ({"ordering": "deadline"}, ["second", "first", "third"]),
        ({"ordering": "slack"}, ["first", "third", "second"]),
        ("hexgen", ["third", "first", "second"]),
    ],
)
def test_the_policy_orders(make_scheduler: Make, policy: Any, order: list[str]) -> None:
    def call(request_id: str, arrival_time: float, **wf: int) -> Any:
        return build_request(request_id, arrival_time=arrival_time, **wf)

    scheduler = make_scheduler(policy=policy)
    now = time.time()
    add(
        scheduler,
        call("first", now, wf_budget_ms=40_000, wf_service_ms=5_000, wf_rest_ms=10_000),
        call("second", now + 1, wf_budget_ms=30_000, wf_service_ms=1_000),
        call("third", now + 2, wf_budget_ms=90_000, wf_service_ms=10_000, wf_rest_ms=55_000),
    )

    assert ids(scheduler.waiting) == order


def test_a_policy_that_is_stock_leaves_vllms_queues_in_place(make_scheduler: Make) -> None:
    scheduler = make_scheduler(policy="least-outstanding")

    add(scheduler, build_request("late", wf_budget_ms=-1))

    assert type(scheduler.waiting) is FCFSRequestQueue
    scheduler.finish_requests("late", RequestStatus.FINISHED_ABORTED)
    assert scheduler._order.stats.deadline_missed == 1


def test_a_session_is_ranked_anew_at_each_turn(make_scheduler: Make) -> None:
    scheduler = make_scheduler()
    add(
        scheduler,
        build_request("session", resumable=True, max_tokens=1, wf_budget_ms=90_000),
        build_request("other", wf_budget_ms=50_000),
    )
    run_step(scheduler)  # the session's first turn ends; it waits for the next
    assert scheduler.requests["session"].status == RequestStatus.WAITING_FOR_STREAMING_REQ

    add(scheduler, build_request("session", resumable=True, wf_budget_ms=1_000))

    call = scheduler._order.calls.get("session")
    assert call.latest_start < time.time() + 5
    assert ids(scheduler.kv_holding_waiting) == ["session"]
    run_step(scheduler)
    assert "session" in ids(scheduler.running)


# --- nothing is kept, nothing raises


def test_state_goes_with_the_request(make_scheduler: Make) -> None:
    scheduler = make_scheduler(num_seats=2)
    add(scheduler, *(build_request(f"r{i}", max_tokens=3, wf_budget_ms=9_000) for i in range(20)))
    scheduler.finish_requests(["r3", "r17"], RequestStatus.FINISHED_ABORTED)

    for _ in range(60):
        run_step(scheduler)

    assert not scheduler.requests
    assert len(scheduler._order.calls) == 0
    assert scheduler._order.stats.deadline_met == 18


def test_a_call_that_ends_late_is_counted(make_scheduler: Make) -> None:
    scheduler = make_scheduler()
    add(scheduler, build_request("late", max_tokens=1, wf_budget_ms=0))

    run_step(scheduler)

    assert scheduler._order.stats.deadline_missed == 1
    assert sum(scheduler._order.stats.slack_counts) == 1


def test_an_error_of_ours_leaves_the_step_to_vllm_and_is_logged_once(
    make_scheduler: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import logging

    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    scheduler = make_scheduler()
    fill_seats(scheduler)
    add(scheduler, build_request("urgent", wf_budget_ms=1_000))

    def fails(now: float) -> None:
        raise RuntimeError("broken on purpose")

    monkeypatch.setattr(scheduler._order._preemption, "make_room", fails)
    for _ in range(3):
        output = run_step(scheduler)

    assert len(output.num_scheduled_tokens) == 2
    assert scheduler._order.stats.failures == 3
    assert caplog.text.count("leaves this step to vLLM") == 1


def test_a_clock_that_jumps_back_stops_nothing(
    make_scheduler: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = make_scheduler()
    fill_seats(scheduler)
    real_time = time.time

    monkeypatch.setattr(time, "time", lambda: real_time() - 86_400.0)
    add(scheduler, build_request("urgent", arrival_time=real_time(), wf_budget_ms=1_000))
    for _ in range(200):
        run_step(scheduler)

    assert scheduler._order.stats.failures == 0
    assert scheduler.get_num_unfinished_requests() == 0


# --- refusals at start


@pytest.mark.parametrize(
    ("additional_config", "message"),
    [
        ({"workflow": {"policy": "nonsense"}}, "unknown policy 'nonsense'"),
        ({"workflow": {"policy": {"alpha": 7}}}, "alpha: expected a number from 0 to 1, got 7"),
        ({"workflow": {"policy": "/no/such/policy.json"}}, "/no/such/policy.json: cannot read"),
        ({"workflow": {"polcy": {}}}, "unknown field 'polcy'"),
        ({"workflow": "hexgen"}, "expected {\"policy\": …}, got 'hexgen'"),
    ],
)
def test_a_bad_policy_is_refused_in_one_line(
    make_scheduler: Make, additional_config: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        make_scheduler(additional_config=additional_config)

    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_the_environment_names_a_policy_and_the_flag_overrides_it(
    make_scheduler: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_WORKFLOW_POLICY", "hexgen")

    assert make_scheduler()._order.policy.ordering == "urgency"
    assert make_scheduler(policy={"ordering": "deadline"})._order.policy.ordering == "deadline"


def test_a_diffusion_model_is_refused() -> None:
    config = SimpleNamespace(model_config=SimpleNamespace(is_diffusion=True))

    with pytest.raises(ConfigError, match="diffusion models need vLLM's own scheduler"):
        compat.check_model(config)


@pytest.mark.parametrize("name", ["_preempt_request", "_free_blocks", "_update_request_as_session"])
def test_a_vllm_of_unknown_shape_is_refused_by_name(
    make_scheduler: Make, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.delattr(Scheduler, name)

    with pytest.raises(ConfigError, match=rf"vLLM \d\S+ has no Scheduler\.{name}; .* supports"):
        make_scheduler()


def test_a_missing_request_attribute_is_found_before_the_first_request(
    make_scheduler: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compat, "_REQUEST", (*compat._REQUEST, "num_wheels"))

    with pytest.raises(ConfigError, match=r"has no Request\.num_wheels"):
        make_scheduler()
