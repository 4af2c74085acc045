"""Quotas of tenants, and the SLO that a tenant's runs have without stating one."""

import math

import pytest

from tests.builders import outcome, stage_request
from tests.core.tenant_builders import EARLY, LATE, brain, call, tenants
from vllm_workflow.core.config import PolicyConfig
from vllm_workflow.core.errors import QuotaExceededError
from vllm_workflow.core.tenant_account import RUN_IDLE_S
from vllm_workflow.core.tenants import TenantConfig
from vllm_workflow.core.types import StageRequest


@pytest.mark.parametrize("policy", [LATE, EARLY], ids=["late", "early"])
def test_calls_beyond_the_concurrency_quota_wait_for_one_to_end(policy: PolicyConfig) -> None:
    quota = tenants(TenantConfig(name="t", max_concurrent_calls=2))
    router = brain(quota, seats=9, policy=policy)
    sent = [router.submit(call(f"r{n}", "t"), now=0.0) for n in range(3)]
    other = router.submit(call("o", "other"), now=0.0)

    assert [decision is not None for decision in sent] == [True, True, False]
    assert other is not None
    router.settle(outcome("r0", "a"))
    assert [decision.request_id for decision in router.poll(1.0)] == ["r2"]


def test_runs_beyond_the_quota_wait_while_those_under_way_go_on() -> None:
    router = brain(tenants(TenantConfig(name="t", max_concurrent_runs=1)), seats=9)

    def of_run(request_id: str, run: str, *, final: bool = False) -> StageRequest:
        return stage_request(request_id, tenant_id="t", workflow_id=run, final=final)

    assert router.submit(of_run("a1", "a"), now=0.0)
    assert router.submit(of_run("b1", "b"), now=0.0) is None
    router.settle(outcome("a1", "a", e2el_s=1.0))
    assert router.poll(2.0) == []
    assert router.submit(of_run("a2", "a", final=True), now=2.0)
    router.settle(outcome("a2", "a", e2el_s=1.0))
    assert [decision.request_id for decision in router.poll(4.0)] == ["b1"]


def test_a_run_whose_final_call_ends_before_others_of_it_makes_room_for_the_next_one() -> None:
    router = brain(tenants(TenantConfig(name="t", max_concurrent_runs=1)), seats=9)

    def of_run(request_id: str, run: str, *, final: bool = False) -> StageRequest:
        return stage_request(request_id, tenant_id="t", workflow_id=run, final=final)

    router.submit(of_run("beside", "a"), now=0.0)
    router.submit(of_run("last", "a", final=True), now=0.0)
    router.settle(outcome("last", "a", e2el_s=1.0))
    assert router.submit(of_run("later", "a"), now=1.5)
    assert router.submit(of_run("other", "b"), now=1.5) is None
    router.settle(outcome("beside", "a", e2el_s=2.0))
    assert router.poll(2.0) == []
    router.settle(outcome("later", "a", e2el_s=1.0))

    assert [decision.request_id for decision in router.poll(3.0)] == ["other"]


def test_a_run_that_says_no_end_stops_counting_when_it_was_idle_for_long() -> None:
    router = brain(tenants(TenantConfig(name="t", max_concurrent_runs=1)), seats=9)
    router.submit(stage_request("a1", tenant_id="t", workflow_id="a"), now=0.0)
    router.submit(stage_request("b1", tenant_id="t", workflow_id="b"), now=0.0)
    router.settle(outcome("a1", "a", e2el_s=1.0))
    router.poll(1.0)

    assert router.waiting.held_until == 1.0 + RUN_IDLE_S
    assert router.poll(router.waiting.held_until - 0.1) == []
    assert [d.request_id for d in router.poll(router.waiting.held_until)] == ["b1"]


@pytest.mark.parametrize("policy", [LATE, EARLY], ids=["late", "early"])
def test_calls_beyond_the_token_quota_wait_until_there_are_tokens(policy: PolicyConfig) -> None:
    quota = TenantConfig(name="t", tokens_per_minute=6000.0, burst_tokens=220.0)
    router = brain(tenants(quota), seats=9, policy=policy)
    sent = [router.submit(call(f"r{n}", "t"), now=0.0) for n in range(3)]  # of 110 tokens each

    assert [decision is not None for decision in sent] == [True, True, False]
    assert router.waiting.held_until == pytest.approx(1.1)
    assert router.poll(1.0) == []
    assert [d.request_id for d in router.poll(router.waiting.held_until)] == ["r2"]


def test_tokens_are_charged_as_counted_in_the_end() -> None:
    quota = TenantConfig(name="t", tokens_per_minute=6000.0, burst_tokens=300.0)
    router = brain(tenants(quota), seats=9)
    router.submit(call("r0", "t"), now=0.0)
    router.settle(outcome("r0", "a", e2el_s=1.0, num_prompt_tokens=100, num_output_tokens=1000))

    assert router.submit(call("r1", "t"), now=1.0) is None
    assert router.waiting.held_until == pytest.approx(1.0 + (1000 + 110 - 300) / 100, abs=0.2)


def test_a_prompt_larger_than_the_bucket_is_refused_for_good() -> None:
    router = brain(tenants(TenantConfig(name="t", tokens_per_minute=50.0)))

    with pytest.raises(QuotaExceededError, match="about 100 tokens is more than its 50") as info:
        router.submit(call("r", "t"), now=0.0)

    assert info.value.retry_after_s is None
    assert len(router.waiting) == 0


def test_a_call_due_before_there_are_tokens_is_told_when_to_come_again() -> None:
    router = brain(tenants(TenantConfig(name="t", tokens_per_minute=110.0)), seats=9)
    router.submit(call("r0", "t"), now=0.0)

    with pytest.raises(QuotaExceededError) as info:
        router.submit(call("r1", "t", deadline=30.0), now=0.0)

    assert info.value.retry_after_s == pytest.approx(60.0)
    assert router.submit(call("r2", "t", deadline=90.0), now=0.0) is None


def test_a_run_that_states_no_slo_has_its_tenants() -> None:
    router = brain(tenants(TenantConfig(name="gold", slo_s=30.0)))

    def predicted(tenant_id: str, deadline: float = math.inf) -> float:
        request = stage_request(
            arrival_time=9.0, run_arrival_time=5.0, tenant_id=tenant_id, deadline=deadline
        )
        return router.predict(request, num_prompt_bytes=400, max_tokens=10).deadline

    assert predicted("gold") == 35.0
    assert predicted("gold", deadline=7.0) == 7.0
    assert predicted("else") == math.inf


def test_an_slo_can_be_a_multiple_of_what_a_run_takes_alone() -> None:
    router = brain(tenants(TenantConfig(name="t", slo_scale=4.0)))
    request = router.predict(
        stage_request(arrival_time=0.0, tenant_id="t"), num_prompt_bytes=400, max_tokens=10
    )
    alone_s = router.fleet.mean_service_s(
        "", request.num_prompt_tokens, request.expected_output_tokens
    )

    assert request.deadline == pytest.approx(4.0 * alone_s)


def test_the_delay_of_each_call_of_a_held_run_is_told() -> None:
    router = brain(tenants(TenantConfig(name="t", max_concurrent_runs=1)), seats=2)
    assert router.tenants is not None
    delays = []
    router.tenants.on_delay = lambda *delay: delays.append(delay)
    for number in range(3):
        request = stage_request(f"r{number}", tenant_id="t")
        router.submit(request, now=float(number))
    for number in range(3):
        router.settle(outcome(f"r{number}", "a", e2el_s=1.0))
        router.poll(10.0 + number)

    assert delays == [("t", "runs", 9.0), ("t", "runs", 9.0)]
