"""What holds of tenants whatever their calls do."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.builders import SLOW, dispatcher, instance
from tests.core.tenant_builders import EARLY, LATE, QUOTAS, Step, brain, call, drive, steps, tenants
from vllm_workflow.core.config import PolicyConfig
from vllm_workflow.core.tenants import TenantConfig, TenantsConfig


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
