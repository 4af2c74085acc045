import math
import sys
from collections.abc import Callable

import pytest

from tests.builders import instance, outcome, stage_request
from tests.core.tenant_builders import LATE, brain, call, tenants
from vllm_workflow.core.dispatcher import Dispatcher
from vllm_workflow.core.errors import ConfigError
from vllm_workflow.core.events import Started, from_json, to_json
from vllm_workflow.core.latency import LatencyModel
from vllm_workflow.core.tenant_ledger import MAX_TENANTS, SHARED_TENANT
from vllm_workflow.core.tenants import TenantConfig, TenantsConfig
from vllm_workflow.core.types import StageRequest


def served(brain: Dispatcher, first: str, num_calls: int) -> list[str]:
    """End one call after the other; return which were sent in their place."""
    order = []
    now, running = 1.0, first
    for _ in range(num_calls):
        brain.settle(outcome(running, "a"))
        sent = [decision.request_id for decision in brain.poll(now)]
        if not sent:
            break
        (running,) = sent
        order.append(running)
        now += 1.0
    return order


def test_tenants_take_turns_however_many_and_urgent_the_calls_of_one_are() -> None:
    router = brain()
    for number in range(6):
        router.submit(call(f"f{number}", "flood", deadline=1.0), now=0.0)
    for number in range(2):
        router.submit(call(f"q{number}", "quiet", deadline=99.0), now=0.0)

    assert served(router, "f0", 5) == ["f1", "q0", "f2", "q1", "f3"]


def test_within_the_lag_the_more_urgent_call_goes_first_whoever_it_belongs_to() -> None:
    router = brain(tenants(lag=1e6))
    router.submit(call("f0", "flood", deadline=1.0), now=0.0)
    router.submit(call("f1", "flood", deadline=5.0), now=0.0)
    router.submit(call("q0", "quiet", deadline=99.0), now=0.0)

    assert served(router, "f0", 2) == ["f1", "q0"]


def test_inside_a_tenant_the_policy_decides() -> None:
    router = brain()
    router.submit(call("x", "t"), now=0.0)
    router.submit(call("relaxed", "t", deadline=90.0), now=0.0)
    router.submit(call("urgent", "t", deadline=10.0), now=0.0)

    assert served(router, "x", 2) == ["urgent", "relaxed"]


def test_weights_are_the_ratio_of_service_while_both_want_more() -> None:
    router = brain(tenants(TenantConfig(name="two", weight=2.0), TenantConfig(name="one")))
    router.submit(call("first", "one"), now=0.0)
    for number in range(60):
        router.submit(call(f"two{number}", "two"), now=0.0)
        router.submit(call(f"one{number}", "one"), now=0.0)

    order = served(router, "first", 60)

    assert sum(name.startswith("two") for name in order) == pytest.approx(40, abs=2)


def test_a_tenant_that_was_idle_has_not_saved_up_service() -> None:
    router = brain(tenants(credit=1e6))
    router.submit(call("early", "idle"), now=0.0)
    router.submit(call("b0", "busy"), now=0.0)
    assert served(router, "early", 1) == ["b0"]
    for number in range(1, 30):
        router.submit(call(f"b{number}", "busy"), now=2.0)
    served(router, "b0", 10)
    for number in range(10):
        router.submit(call(f"i{number}", "idle"), now=20.0)

    order = served(router, "b10", 10)

    assert sum(name.startswith("i") for name in order) == pytest.approx(5, abs=1)


def test_what_a_call_turns_out_to_cost_counts_not_what_was_predicted() -> None:
    router = brain(tenants(credit=1e6))
    router.submit(call("l0", "long"), now=0.0)
    router.submit(call("s0", "short"), now=0.0)
    router.settle(outcome("l0", "a", num_prompt_tokens=100, num_output_tokens=1000))
    router.poll(1.0)
    for number in range(1, 20):
        router.submit(call(f"l{number}", "long"), now=1.0)
        router.submit(call(f"s{number}", "short"), now=1.0)

    order = served(router, "s0", 10)

    assert all(name.startswith("s") for name in order)


def test_a_call_that_failed_counts_as_predicted() -> None:
    router = brain(seats=3)
    router.submit(call("a0", "a"), now=0.0)
    router.submit(call("a1", "a"), now=0.0)
    router.submit(call("b0", "b"), now=0.0)
    assert router.tenants is not None
    before = router.tenants.virtual_time("a")
    router.settle(outcome("a0", "a", ok=False))

    assert router.tenants.virtual_time("a") == before > 0.0


def test_a_tenant_that_floods_does_not_join_calls_that_it_would_make_late() -> None:
    """There is a seat, but the decode of the other's call would be too slow beside one more."""
    slow = instance("a", latency=LatencyModel(overhead_s=0.001, weights_s=0.0, per_seq_s=0.1))
    router = brain(tenants(), instances=(slow,))
    router.submit(call("f0", "flood", deadline=0.1), now=0.0)
    router.submit(call("q0", "quiet", deadline=3.0), now=0.0)
    refused = [router.submit(call(f"f{n}", "flood", deadline=0.1), now=0.0) for n in range(1, 9)]

    assert refused[-1] is None
    router.settle(outcome("q0", "a"))
    assert router.poll(1.0)


# Configuration.


def test_tenants_are_read_from_a_mapping_and_survive_the_decision_log() -> None:
    config = TenantsConfig.from_mapping(
        {
            "named": {"acme": {"weight": 2, "tokens_per_minute": 6e5, "slo_s": 30}},
            "default": {"max_concurrent_calls": 4},
            "lag": 1,
        },
        source="router.yaml: tenants",
    )
    started = Started(policy=LATE, fingerprint="f", tenants=config)

    assert config.of("acme").weight == 2.0
    assert config.of("nobody").max_concurrent_calls == 4
    assert from_json(to_json(started)) == started


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (3, "tenants: expected a mapping of fields, got 3"),
        ({"acme": {}}, "tenants: unknown field 'acme'; known fields are"),
        ({"lag": -1}, "tenants.lag: expected a number from 0"),
        ({"lag": True}, "tenants.lag: expected a number, got True"),
        ({"named": {"a": {"weight": 0}}}, "tenants.named.a.weight: expected a number from"),
        ({"named": {"a": {"wait": 0}}}, "tenants.named.a: unknown field 'wait'"),
        ({"named": {"a": {"weight": "2"}}}, "tenants.named.a.weight: expected a number"),
        ({"named": {"a": 1}}, "tenants.named.a: expected a mapping"),
        ({"default": {"max_concurrent_runs": 0}}, "tenants.default.max_concurrent_runs: expected"),
        ({"default": {"max_concurrent_calls": 1.5}}, "tenants.default.max_concurrent_calls: exp"),
        ({"default": {"burst_tokens": 9}}, "tenants.default.burst_tokens: expected tokens_per"),
        ({"default": {"slo_s": 1, "slo_scale": 1}}, "tenants.default.slo_scale: expected none"),
        ({"default": {"slo_s": math.nan}}, "tenants.default.slo_s: expected a number from"),
    ],
)
def test_a_mistake_is_told_with_the_path_to_it(data: object, text: str) -> None:
    with pytest.raises(ConfigError) as info:
        TenantsConfig.from_mapping(data, source="tenants")

    assert str(info.value).startswith(text)


# Cost: a client may name as many tenants and have as many calls wait as it likes.


def python_calls(action: Callable[[], object]) -> int:
    """Count the Python functions and generators entered; as exact as time is not."""
    count = 0

    def profile(_frame: object, event: str, _arg: object) -> None:
        nonlocal count
        count += event == "call"

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        action()
    finally:
        sys.setprofile(before)
    return count


def come_and_go(router: Dispatcher, request: StageRequest) -> None:
    router.submit(request, now=1.0)
    router.settle(outcome("r0", "a"))
    assert len(router.poll(1.0)) == 1


def test_a_decision_looks_at_each_tenant_a_few_times_at_most() -> None:
    router = brain()
    for number in range(301):
        router.submit(call(f"r{number}", f"t{number}"), now=0.0)

    assert python_calls(lambda: come_and_go(router, call("x", "x"))) < 300 * 20


def test_calls_of_runs_that_a_quota_holds_are_not_looked_at_one_by_one() -> None:
    router = brain(tenants(TenantConfig(name="t", max_concurrent_runs=1)), seats=2)
    for number in range(301):
        request = stage_request(f"r{number}", tenant_id="t", workflow_id=f"w{number}")
        router.submit(request, now=0.0)
    same_run = stage_request("x", tenant_id="t", workflow_id="w0")
    new_run = stage_request("y", tenant_id="t", workflow_id="another")

    assert python_calls(lambda: router.submit(same_run, now=1.0)) < 300
    assert router.num_in_flight == 2
    assert python_calls(lambda: router.submit(new_run, now=1.0)) < 300
    assert router.num_in_flight == 2


def test_tenants_beyond_the_most_share_an_account_unless_they_are_named() -> None:
    router = brain(tenants(TenantConfig(name="named", weight=2.0)))
    for number in range(MAX_TENANTS + 50):
        router.submit(call(f"r{number}", f"t{number}"), now=0.0)
    router.submit(call("x", "named"), now=0.0)
    assert router.tenants is not None
    accounts = dict(router.tenants)

    assert len(accounts) == MAX_TENANTS + 2
    assert accounts[SHARED_TENANT].num_waiting == 50
    assert accounts["named"].num_waiting == 1
