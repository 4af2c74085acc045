import math
import sys
from collections.abc import Callable, Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.builders import SLOW, dispatcher, instance, outcome, stage_request
from vllm_workflow.core.config import PolicyConfig
from vllm_workflow.core.dispatcher import Dispatcher
from vllm_workflow.core.errors import ConfigError, QuotaExceededError
from vllm_workflow.core.events import Started, from_json, to_json
from vllm_workflow.core.fleet import Instance
from vllm_workflow.core.latency import LatencyModel
from vllm_workflow.core.tenant_account import RUN_IDLE_S
from vllm_workflow.core.tenant_ledger import MAX_TENANTS, SHARED_TENANT
from vllm_workflow.core.tenants import TenantConfig, TenantsConfig
from vllm_workflow.core.types import StageRequest

LATE = PolicyConfig(late_binding=True)
EARLY = PolicyConfig()


def tenants(*named: TenantConfig, lag: float = 0.0, credit: float = 0.5) -> TenantsConfig:
    return TenantsConfig(named=named, lag=lag, credit=credit)


def brain(
    config: TenantsConfig | None = None,
    *,
    seats: int = 1,
    policy: PolicyConfig = LATE,
    instances: tuple[Instance, ...] = (),
) -> Dispatcher:
    each = instances or (instance("a", max_num_seqs=seats),)
    return dispatcher(*each, config=policy, tenants=config or tenants())


def call(request_id: str, tenant_id: str, *, deadline: float = math.inf) -> StageRequest:
    return stage_request(request_id, tenant_id=tenant_id, deadline=deadline)


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


# Quotas.


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


# SLO classes.


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


# Laws.

Step = tuple[str, int, float]
steps = st.lists(
    st.tuples(
        st.sampled_from(["submit", "submit", "submit", "settle", "fail", "leave"]),
        st.integers(0, 30),
        st.floats(0.0, 5.0),
    ),
    max_size=60,
)
QUOTAS = TenantsConfig(
    named=(
        TenantConfig(name="t0", weight=3.0),
        TenantConfig(name="t1", max_concurrent_calls=2, slo_s=9.0),
        TenantConfig(name="t2", max_concurrent_runs=1, tokens_per_minute=6000.0),
    ),
)


def drive(router: Dispatcher, script: Iterable[Step], names: str = "012") -> list[tuple[str, str]]:
    """Let calls come and go; then end all. Returns what was sent where, in order."""
    now, in_flight, waiting, sent = 0.0, dict[str, str](), list[str](), list[tuple[str, str]]()

    def poll() -> None:
        for decision in router.poll(now):
            in_flight[decision.request_id] = decision.chosen.instance_id
            sent.append((decision.request_id, decision.chosen.instance_id))
            waiting.remove(decision.request_id)

    for number, (what, pick, value) in enumerate(script):
        now += value
        if what == "submit":
            request = stage_request(
                f"r{number}",
                arrival_time=now,
                tenant_id=f"t{names[pick % 3]}",
                workflow_id=f"w{pick % 4}" if pick % 5 else "",
                deadline=now + 20.0 * value if pick % 2 else math.inf,
                expected_output_tokens=1.0 + 10 * pick,
            )
            waiting.append(request.request_id)
            try:
                decision = router.submit(request, now=now)
            except QuotaExceededError:
                waiting.remove(request.request_id)
                continue
            if decision is not None:
                in_flight[request.request_id] = decision.chosen.instance_id
                sent.append((request.request_id, decision.chosen.instance_id))
                waiting.remove(request.request_id)
        elif what in {"settle", "fail"} and in_flight:
            request_id = list(in_flight)[pick % len(in_flight)]
            router.settle(
                outcome(
                    request_id,
                    in_flight.pop(request_id),
                    ok=what == "settle",
                    e2el_s=value,
                    num_prompt_tokens=100,
                    num_output_tokens=1 + pick,
                )
            )
        elif what == "leave" and waiting:
            router.withdraw(waiting.pop(pick % len(waiting)))
        poll()
    for _ in range(1000):
        if not in_flight and not waiting:
            break
        for request_id, instance_id in list(in_flight.items()):
            del in_flight[request_id]
            router.settle(outcome(request_id, instance_id))
        if router.waiting.held_until < math.inf:
            now = max(now, router.waiting.held_until)
        poll()
    assert not waiting, f"{waiting} never came to run"
    return sent


@pytest.mark.parametrize("policy", [LATE, EARLY, PolicyConfig(late_binding=True, relegate=True)])
@given(script=steps)
@settings(max_examples=60, deadline=None)
def test_every_call_comes_to_run_and_nothing_is_left_in_the_ledger(
    policy: PolicyConfig, script: list[Step]
) -> None:
    router = brain(tenants(), seats=2, policy=policy)
    drive(router, script)

    assert router.tenants is not None
    assert len(router.tenants) == 0


@pytest.mark.parametrize("policy", [LATE, EARLY, PolicyConfig(late_binding=True, relegate=True)])
@given(script=steps)
@settings(max_examples=60, deadline=None)
def test_every_call_within_its_quotas_comes_to_run(
    policy: PolicyConfig, script: list[Step]
) -> None:
    drive(brain(QUOTAS, seats=2, policy=policy), script)


@given(script=steps)
@settings(max_examples=60, deadline=None)
def test_no_instance_is_idle_while_a_call_waits(script: list[Step]) -> None:
    router = brain(
        tenants(), instances=(instance("a", max_num_seqs=2), instance("b", latency=SLOW))
    )
    for what, pick, value in script:
        drive(router, [(what, pick, value)]) if what == "submit" else None
    for number in range(6):
        router.submit(call(f"x{number}", f"t{number % 3}"), now=1e4)
        router.poll(1e4)

        assert not len(router.waiting) or all(map(router.fleet.num_outstanding, "ab"))


@given(script=steps)
@settings(max_examples=60, deadline=None)
def test_one_tenant_alone_is_served_as_without_tenants(script: list[Step]) -> None:
    same = [(what, 3 * pick, value) for what, pick, value in script]
    without = dispatcher(instance("a", max_num_seqs=2), instance("b"), config=LATE)
    alone = brain(instances=(instance("a", max_num_seqs=2), instance("b")))

    assert drive(alone, same) == drive(without, same)


@given(script=steps, names=st.permutations("012"))
@settings(max_examples=60, deadline=None)
def test_what_tenants_are_called_changes_nothing(script: list[Step], names: list[str]) -> None:
    def renamed(tenant: TenantConfig) -> TenantConfig:
        values = {f: getattr(tenant, f) for f in tenant.__dataclass_fields__}
        return TenantConfig(**{**values, "name": f"t{names[int(tenant.name[1])]}"})

    other = TenantsConfig(named=tuple(renamed(t) for t in reversed(QUOTAS.named)))

    assert drive(brain(other, seats=2), script, "".join(names)) == drive(
        brain(QUOTAS, seats=2), script
    )


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
