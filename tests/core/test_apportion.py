"""Shares, quotas and declared workflows that change while calls wait and run."""

import math

import pytest
from hypothesis import given, settings

from tests.builders import FAST, dispatcher, instance, outcome, stage_request, workflow
from tests.core.test_replay import OTHERS, TENANTS, Step, recorded, steps
from vllm_workflow.core.config import PolicyConfig
from vllm_workflow.core.dispatcher import Dispatcher
from vllm_workflow.core.errors import QuotaExceededError
from vllm_workflow.core.events import Apportioned, Event
from vllm_workflow.core.tenants import TenantConfig, TenantsConfig

LATE = PolicyConfig(ordering="fcfs", late_binding=True)
AT_ONCE = PolicyConfig(dispatch="least-outstanding", ordering="fcfs")
HOLDING = PolicyConfig(ordering="slack", late_binding=True, relegate=True)


def only(**quota: float) -> TenantsConfig:
    """Quotas of tenant `t`."""
    return TenantsConfig(named=(TenantConfig(name="t", **quota),))  # type: ignore[arg-type]


def brain_with(
    config: PolicyConfig, tenants: TenantsConfig | None = None, *, seats: int = 8
) -> Dispatcher:
    return dispatcher(
        instance("a", latency=FAST, max_num_seqs=seats), config=config, tenants=tenants
    )


def submitted(brain: Dispatcher, *names: str, tenant: str = "t", now: float = 0.0) -> list[str]:
    """Submit calls of a tenant, each a run of its own; returns those that were sent."""
    sent = []
    for name in names:
        call = stage_request(name, arrival_time=now, tenant_id=tenant, workflow_id=f"run-{name}")
        if brain.submit(call, now=now) is not None:
            sent.append(name)
    return sent


def started(brain: Dispatcher, now: float) -> list[str]:
    return [decision.request_id for decision in brain.poll(now)]


def settle(brain: Dispatcher, *names: str) -> None:
    for name in names:
        brain.settle(outcome(name, "a", num_prompt_tokens=100, num_output_tokens=10))


@pytest.mark.parametrize("config", [LATE, HOLDING], ids=["late", "relegating"])
def test_calls_that_wait_wait_on_when_tenants_come_and_go(config: PolicyConfig) -> None:
    brain = brain_with(config, seats=1)
    submitted(brain, "first", "second", "third")

    for tenants in (TENANTS, OTHERS, None, OTHERS, None):
        brain.apportion(tenants, now=1.0)
        assert started(brain, 1.0) == []
    assert len(brain.waiting) == 2

    settle(brain, "first")
    assert started(brain, 2.0) == ["second"]


def test_a_quota_that_comes_holds_back_calls_that_wait_already() -> None:
    brain = brain_with(LATE, seats=2)
    submitted(brain, "first", "second", "third")

    brain.apportion(only(max_concurrent_calls=1), now=1.0)

    settle(brain, "first")
    assert started(brain, 1.0) == []
    settle(brain, "second")
    assert started(brain, 1.0) == ["third"]


def test_a_quota_that_goes_lets_calls_go_that_it_held() -> None:
    brain = brain_with(AT_ONCE, only(max_concurrent_calls=1))
    assert submitted(brain, "first", "second", "third") == ["first"]

    brain.apportion(only(max_concurrent_calls=2), now=1.0)
    assert started(brain, 1.0) == ["second"]
    brain.apportion(None, now=2.0)
    assert started(brain, 2.0) == ["third"]


def test_runs_in_flight_count_for_a_quota_of_runs_that_comes() -> None:
    brain = brain_with(AT_ONCE, only(weight=2.0))
    for name in ("one", "other"):
        brain.submit(stage_request(name, tenant_id="t", workflow_id="run"), now=0.0)

    brain.apportion(only(max_concurrent_runs=1), now=1.0)

    assert submitted(brain, "next", now=1.0) == []
    settle(brain, "one")
    assert started(brain, 100.0) == []  # the other one is still under way
    settle(brain, "other")
    assert started(brain, 101.0) == ["next"]


def test_tokens_used_up_under_the_old_rate_stay_used_up() -> None:
    brain = brain_with(AT_ONCE, only(tokens_per_minute=600.0, burst_tokens=200.0))
    submitted(brain, "first")

    brain.apportion(only(tokens_per_minute=60.0, burst_tokens=200.0), now=1.0)

    # 110 of 200 tokens were taken, 10 have come back in a second: 100 of 110 are there.
    assert submitted(brain, "second", now=1.0) == []
    assert started(brain, 1.0 + 9.9) == []
    assert started(brain, 1.0 + 10.1) == ["second"]


def test_tokens_are_counted_from_the_moment_there_is_a_quota() -> None:
    brain = brain_with(AT_ONCE)
    submitted(brain, "first")

    brain.apportion(only(tokens_per_minute=60.0, burst_tokens=200.0), now=0.0)

    assert submitted(brain, "second") == []  # the one in flight is charged
    call = stage_request("third", deadline=5.0, tenant_id="t")
    with pytest.raises(QuotaExceededError):
        brain.submit(call, now=0.0)


def test_a_new_share_counts_for_what_is_sent_from_then_on() -> None:
    brain = brain_with(LATE, TenantsConfig(lag=0.0), seats=1)
    submitted(brain, "other", tenant="u")
    submitted(brain, *(f"t{i}" for i in range(6)))
    submitted(brain, *(f"u{i}" for i in range(6)), tenant="u")

    brain.apportion(TenantsConfig(named=(TenantConfig(name="t", weight=3.0),), lag=0.0), now=0.0)

    order, last = [], "other"
    for _ in range(8):
        settle(brain, last)
        (last,) = started(brain, 0.0)
        order.append(last[0])
    assert order.count("t") == 6


def test_a_promise_that_comes_counts_for_calls_from_then_on() -> None:
    brain = brain_with(AT_ONCE)
    brain.apportion(only(slo_s=30.0), now=0.0)
    call = stage_request("r", tenant_id="t", arrival_time=1.0)

    assert brain.predict(call, num_prompt_bytes=10, max_tokens=1).deadline == 31.0
    brain.apportion(None, now=2.0)
    assert brain.predict(call, num_prompt_bytes=10, max_tokens=1).deadline == math.inf


def test_that_tenants_change_is_in_the_log() -> None:
    log: list[Event] = []
    brain = dispatcher(config=LATE, record=log.append)

    brain.apportion(TENANTS, now=3.0)

    assert log[-1] == Apportioned(now=3.0, tenants=TENANTS)


@given(script=steps)
@settings(max_examples=60)
def test_when_every_call_has_ended_nothing_is_charged_to_anybody(script: list[Step]) -> None:
    brain = recorded(LATE, script, [], TENANTS)
    brain.apportion(TenantsConfig(), now=1e6)
    for _ in range(200):
        brain.poll(1e6)
        for request_id, sent in list(brain._sent.items()):
            brain.settle(outcome(request_id, sent.decision.chosen.instance_id))
    for held in brain.waiting.by_arrival():
        brain.withdraw(held.request.request_id)

    assert brain.tenants is not None
    assert len(brain.tenants) == 0


def test_workflows_that_are_declared_anew_are_what_is_predicted_from_then_on() -> None:
    brain = dispatcher(workflows=(workflow("w", generate=1.0, judge=4.0),))
    call = stage_request("r", workflow="w", stage="generate")

    def rest_s() -> float:
        return brain.predict(call, num_prompt_bytes=10, max_tokens=1).rest_s

    before = rest_s()
    brain.declare([workflow("w", generate=1.0, judge=2.0)])
    assert rest_s() == pytest.approx(before / 2.0)
    brain.declare([])
    assert rest_s() == 0.0


def test_a_length_that_is_declared_no_more_is_guessed() -> None:
    brain = dispatcher(workflows=(workflow("w", generate=1.0),))
    call = stage_request("r", workflow="w", stage="generate")

    assert brain.predict(call, num_prompt_bytes=10, max_tokens=None).expected_from == "declared"
    brain.declare([])
    assert brain.predict(call, num_prompt_bytes=10, max_tokens=None).expected_from == "prior"
