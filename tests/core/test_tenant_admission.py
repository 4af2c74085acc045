"""Whose runs begin, wait, and are refused, when not all can be on time."""

import math
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.builders import dispatcher, instance, outcome, stage_request
from tests.core.tenant_builders import QUOTAS, Step, brain, drive, steps, tenants
from vllm_workflow.core.admission import Demand, Held, run_key
from vllm_workflow.core.config import PolicyConfig
from vllm_workflow.core.dispatcher import Dispatcher
from vllm_workflow.core.errors import OverloadedError
from vllm_workflow.core.pace import Pace
from vllm_workflow.core.tenant_admission import TenantAdmission
from vllm_workflow.core.tenants import TenantConfig
from vllm_workflow.core.types import StageRequest

OVERLOADED = PolicyConfig(late_binding=True, relegate=True, relegation_margin=0.0)


def run(name: str, tenant_id: str, *, came: float = 0.0, priority: int = 0) -> StageRequest:
    """The first call of a run that needs 0.1 s on an idle fleet and is promised four times that."""
    return stage_request(
        f"{tenant_id}/{name}/first",
        workflow_id=name,
        workflow="w",
        tenant_id=tenant_id,
        priority=priority,
        arrival_time=came,
        run_arrival_time=came,
        deadline=came + 0.4,
        rest_s=0.09,
    )


def door(
    under_way: Mapping[str, int],
    *,
    weights: Mapping[str, float] | None = None,
    ready_at: Mapping[str, float] | None = None,
) -> TenantAdmission:
    """Runs of some tenants are under way, and with 12 of them each is just on time.

    What was seen: beside 11 others, calls take 3.9 times as long as alone.
    """
    pace = Pace()
    for round_ in range(40):
        calls = [run(f"past-{round_}-{i}", "past") for i in range(12)]
        begin = -1e4 * (40 - round_)
        for call in calls:
            pace.opened(run_key(call), call, begin)
        for call in calls:
            pace.closed(run_key(call), call, end_time=begin + 1950.0, idle_s=500.0, ok=True)
    for tenant_id, number in under_way.items():
        for i in range(number):
            call = run(f"now-{i}", tenant_id)
            pace.opened(run_key(call), call, 0.0)
    admission = TenantAdmission(
        pace,
        OVERLOADED,
        demand=Demand(),
        weight=lambda tenant_id: (weights or {}).get(tenant_id, 1.0),
        ready_time=lambda request, now: (ready_at or {}).get(request.tenant_id, now),
    )
    for _ in range(50):
        admission.arrived(run("earlier", "past"), 0.01, 0.0)
    return admission


def hold(admission: TenantAdmission, *requests: StageRequest) -> None:
    for request in requests:
        admission.hold(Held(request, 0, ()))


def begun(admission: TenantAdmission, now: float = 0.0) -> list[str]:
    """Let runs begin until none may; returns whose they are."""
    names = []
    while calls := admission.beginning(now, is_idle=False):
        for held in calls:
            admission.pace.opened(run_key(held.request), held.request, now)
        names.append(calls[0].request.tenant_id)
    return names


def test_alone_a_tenant_has_all_the_room_there_is() -> None:
    admission = door({"a": 9})
    hold(admission, *(run(f"new-{i}", "a") for i in range(9)))

    assert begun(admission) == ["a", "a", "a"]


def test_a_tenant_within_its_share_begins_however_much_another_has_under_way() -> None:
    admission = door({"flood": 30})
    hold(admission, run("new", "flood"), *(run(f"new-{i}", "quiet") for i in range(9)))

    assert begun(admission) == ["quiet"] * 6
    assert admission.num_waiting_runs == 4


def test_room_goes_to_the_tenant_with_fewest_runs_per_weight() -> None:
    admission = door({"a": 3, "b": 4}, weights={"b": 2.0})
    for i in range(9):
        hold(admission, run(f"new-{i}", "a"), run(f"new-{i}", "b"))

    assert sorted(begun(admission)) == ["a", "b", "b", "b", "b"]


def test_a_priority_counts_inside_a_tenant_only() -> None:
    admission = door({"a": 6, "b": 5})
    hold(admission, run("new", "a", priority=-9), run("new", "b"))

    assert begun(admission) == ["b"]


def test_a_tenant_that_a_quota_holds_stands_in_nobody_s_way() -> None:
    admission = door({"a": 2, "b": 9}, ready_at={"a": 7.0})
    hold(admission, run("new", "a"), run("new", "b"))

    assert begun(admission) == ["b"]
    assert admission.ready_at == 7.0


def test_only_those_beyond_their_share_are_told_to_wait_for_long() -> None:
    admission = door({"flood": 12})
    hold(admission, *(run(f"new-{i}", "flood") for i in range(12)), run("new", "quiet"))

    assert admission.wait_s(run("new", "quiet")) == 0.0
    # 24 runs, of which its half of 12 can be under way, and each takes 0.39 s.
    assert admission.wait_s(run("more", "flood")) == pytest.approx((24 - 6) * 0.39 / 6, rel=0.02)


def test_calls_leave_as_they_came() -> None:
    admission = door({"a": 12})
    first, second = run("one", "a"), run("two", "b", came=1.0)
    hold(admission, first, second)

    assert first.request_id in admission
    assert admission.is_first(second.request_id)
    assert [h.request for h in admission.calls()] == [first, second]
    left = admission.leave(first.request_id)
    assert left is not None
    assert left.request is first
    assert admission.leave(first.request_id) is None
    assert len(admission) == admission.num_waiting_runs == 1


# In a dispatcher.

ALONE_S = brain().fleet.mean_service_s("", 100, 10.0)


def warm(router: Dispatcher) -> Dispatcher:
    """Let it see runs that slow each other down: three times as long as alone, two at a time."""
    for number in range(40):
        now = 100.0 * number - 1e4
        for i in range(2):
            router.submit(a_call(f"warm-{number}-{i}", "t0", now=now), now=now)
        router.poll(now)
        while in_flight := list(router._sent):
            now += 3.0 * ALONE_S
            for request_id in in_flight:
                instance_id = router._sent[request_id].decision.chosen.instance_id
                router.settle(outcome(request_id, instance_id, e2el_s=3.0 * ALONE_S))
            router.poll(now)
    assert len(router.waiting) == 0
    return router


def flooded(admission: str = "accept") -> tuple[Dispatcher, int]:
    """A fleet with as many runs of a flood under way as can be on time, and that number."""
    policy = PolicyConfig(
        late_binding=True, relegate=True, relegation_margin=0.0, admission=admission
    )
    router = warm(brain(seats=64, policy=policy))
    return router, sum(submit(router, a_call(f"f{i}", "flood", now=0.0)) for i in range(64))


def a_call(name: str, tenant_id: str, *, now: float) -> StageRequest:
    """The only call of a run, promised four times what it needs alone."""
    return stage_request(
        f"{name}/only",
        workflow_id=name,
        workflow="w",
        tenant_id=tenant_id,
        arrival_time=now,
        run_arrival_time=now,
        deadline=now + 4.0 * ALONE_S,
        final=True,
    )


def submit(router: Dispatcher, request: StageRequest) -> bool:
    now = request.arrival_time
    bound = router.submit(request, now=now) is not None
    router.poll(now)
    return bound


def test_a_flood_waits_to_begin_and_another_tenant_does_not() -> None:
    router, num_under_way = flooded()

    assert 0 < num_under_way < 64
    assert router.waiting.num_held == 64 - num_under_way
    assert submit(router, a_call("one", "quiet", now=0.0))
    assert not submit(router, a_call("more", "flood", now=0.0))


def test_a_flood_is_refused_and_another_tenant_is_not() -> None:
    router, _ = flooded("reject")
    more, one = a_call("more", "flood", now=0.0), a_call("one", "quiet", now=0.0)
    submit(router, more)
    submit(router, one)

    router.waiting.check(one)
    with pytest.raises(OverloadedError):
        router.waiting.check(more)


# Laws.


@given(script=steps)
@settings(max_examples=60, deadline=None)
def test_every_call_of_every_run_comes_to_run(script: list[Step]) -> None:
    router = warm(brain(QUOTAS, seats=2, policy=OVERLOADED))
    drive(router, script)

    assert len(router.waiting) == 0


@given(script=steps)
@settings(max_examples=60, deadline=None)
def test_one_tenant_alone_begins_its_runs_as_without_tenants(script: list[Step]) -> None:
    same = [(what, 3 * pick, value) for what, pick, value in script]
    without = dispatcher(instance("a", max_num_seqs=2), instance("b"), config=OVERLOADED)
    alone = brain(instances=(instance("a", max_num_seqs=2), instance("b")), policy=OVERLOADED)

    assert drive(warm(alone), same) == drive(warm(without), same)


@given(under_way=st.dictionaries(st.sampled_from("abcd"), st.integers(0, 20)), data=st.data())
@settings(deadline=None)
def test_another_s_flood_never_costs_a_tenant_a_run_of_its_share(
    under_way: dict[str, int], data: st.DataObject
) -> None:
    flood = data.draw(st.integers(0, 40))

    def num_begun(**more: int) -> int:
        admission = door({**under_way, **more})
        hold(admission, *(run(f"new-{i}", "quiet") for i in range(12)))
        return len(begun(admission))

    others = sum(number > 0 for number in under_way.values())
    assert num_begun(flood=flood) >= math.floor(12 / (others + 2))


def test_weights_are_tenants_own() -> None:
    router = brain(tenants(TenantConfig(name="large", weight=3.0)), policy=OVERLOADED)

    assert router.waiting._admissions._weight("large") == 3.0  # type: ignore[attr-defined]
