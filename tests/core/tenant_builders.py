"""Dispatchers that know tenants, and scripts of what happens to their calls."""

import math
from collections.abc import Iterable

from hypothesis import strategies as st

from tests.builders import dispatcher, instance, outcome, stage_request
from vllm_workflow.core.config import PolicyConfig
from vllm_workflow.core.dispatcher import Dispatcher
from vllm_workflow.core.errors import QuotaExceededError
from vllm_workflow.core.fleet import Instance
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
