import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.builders import stage_request
from vllm_workflow.core.ordering import ORDERING_POLICIES, OrderingPolicy
from vllm_workflow.core.types import StageRequest

instants = st.floats(-1e6, 1e6)
seconds = st.floats(0.0, 1e4)
requests = st.builds(
    lambda arrival, deadline, rest, service: stage_request(
        arrival_time=arrival, deadline=deadline, rest_s=rest, service_s=service
    ),
    instants,
    instants | st.just(math.inf),
    seconds,
    seconds,
)


def policy(name: str, patience_s: float = 60.0) -> OrderingPolicy:
    return ORDERING_POLICIES[name](patience_s)


@pytest.mark.parametrize("name", ORDERING_POLICIES)
@given(request=requests)
def test_every_key_is_a_finite_number(name: str, request: StageRequest) -> None:
    assert math.isfinite(policy(name).key(request))


def test_fcfs_is_blind_to_deadlines() -> None:
    early = stage_request(arrival_time=1.0, deadline=900.0)
    late = stage_request(arrival_time=2.0, deadline=3.0)

    assert policy("fcfs").key(early) < policy("fcfs").key(late)


def test_deadline_order_runs_the_earlier_deadline_first() -> None:
    early = stage_request(arrival_time=5.0, deadline=30.0)
    late = stage_request(arrival_time=0.0, deadline=40.0, rest_s=39.0)

    assert policy("deadline").key(early) < policy("deadline").key(late)


def test_slack_order_runs_the_later_deadline_first_if_more_is_to_do() -> None:
    much_to_do = stage_request(deadline=40.0, rest_s=20.0, service_s=10.0)
    little_to_do = stage_request(deadline=30.0, rest_s=0.0, service_s=1.0)

    assert policy("slack").key(much_to_do) < policy("slack").key(little_to_do)


@given(first=requests, second=requests, now=st.floats(0.0, 1e3))
def test_the_order_by_key_is_the_order_by_slack_at_any_time(
    first: StageRequest, second: StageRequest, now: float
) -> None:
    def slack(request: StageRequest) -> float:
        deadline = request.deadline if request.has_deadline else request.arrival_time + 60.0
        return deadline - now - request.rest_s - request.service_s

    difference = policy("slack").key(first) - policy("slack").key(second)

    assert difference == pytest.approx(slack(first) - slack(second), abs=1e-6)


def test_urgency_splits_the_budget_in_proportion_to_work() -> None:
    request = stage_request(arrival_time=10.0, deadline=40.0, service_s=2.0, rest_s=4.0)

    # 30 s for 6 s of work: 10 s for this call, of which it needs 2.
    assert policy("urgency").key(request) == 10.0 + 10.0 - 2.0


@pytest.mark.parametrize("name", sorted(ORDERING_POLICIES.keys() - {"fcfs"}))
def test_a_call_without_deadline_waits_for_urgent_ones_but_not_for_ever(name: str) -> None:
    ordinary = stage_request(arrival_time=0.0, service_s=1.0)
    urgent = stage_request(arrival_time=5.0, deadline=10.0, service_s=1.0)
    much_later = stage_request(arrival_time=100.0, deadline=110.0, service_s=1.0)

    key = policy(name, patience_s=60.0).key

    assert key(urgent) < key(ordinary) < key(much_later)
