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
    lambda arrival, deadline, run_arrival, rest, service, attained, share: stage_request(
        arrival_time=arrival,
        deadline=deadline,
        run_arrival_time=run_arrival,
        rest_s=rest,
        service_s=service,
        attained_s=attained,
        attained_path_s=share * attained,
    ),
    instants,
    instants | st.just(math.inf),
    instants | st.just(math.nan),
    seconds,
    seconds,
    seconds,
    st.floats(0.0, 1.0),
)


def policy(name: str, patience_s: float = 60.0, starvation_ratio: float = 1.0) -> OrderingPolicy:
    return ORDERING_POLICIES[name](patience_s, starvation_ratio)


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


@pytest.mark.parametrize("name", ["deadline", "slack", "urgency"])
def test_a_call_without_deadline_waits_for_urgent_ones_but_not_for_ever(name: str) -> None:
    ordinary = stage_request(arrival_time=0.0, service_s=1.0)
    urgent = stage_request(arrival_time=5.0, deadline=10.0, service_s=1.0)
    much_later = stage_request(arrival_time=100.0, deadline=110.0, service_s=1.0)

    key = policy(name, patience_s=60.0).key

    assert key(urgent) < key(ordinary) < key(much_later)


@pytest.mark.parametrize("name", ORDERING_POLICIES)
@given(request=requests, later_s=st.floats(0.0, 1e6))
def test_another_clock_shifts_every_instant_alike_and_no_duration(
    name: str, request: StageRequest, later_s: float
) -> None:
    shifted = request._replace(
        arrival_time=request.arrival_time + later_s,
        deadline=request.deadline + later_s,
        run_arrival_time=request.run_arrival_time + later_s,
    )
    each = policy(name)

    expected = each.key(request) + (later_s if each.key_is_instant else 0.0)
    assert each.key(shifted) == pytest.approx(expected, rel=1e-9, abs=1e-6)


USED = {
    "fcfs": {"arrival_time"},
    "program-fcfs": {"arrival_time", "run_arrival_time"},
    "plas": {"arrival_time", "attained_s"},
    "atlas": {"arrival_time", "attained_path_s"},
    "deadline": {"arrival_time", "deadline"},
    "sjf": {"service_s"},
    "shortest-remaining": {"service_s", "rest_s"},
}
FIELDS = {
    "arrival_time": instants,
    "deadline": instants,
    "run_arrival_time": instants,
    "attained_s": seconds,
    "attained_path_s": seconds,
    "rest_s": seconds,
    "service_s": seconds,
    "num_prompt_tokens": st.integers(1, 100_000),
    "expected_output_tokens": st.floats(1.0, 1e4),
    "final": st.booleans(),
}


@pytest.mark.parametrize("name", USED)
@given(request=requests, data=st.data())
def test_the_order_changes_with_nothing_but_what_the_rule_names(
    name: str, request: StageRequest, data: st.DataObject
) -> None:
    others = {field: data.draw(FIELDS[field], field) for field in FIELDS.keys() - USED[name]}

    assert policy(name).key(request._replace(**others)) == policy(name).key(request)


def test_program_order_runs_the_latest_call_of_the_earliest_run_first() -> None:
    old_run = stage_request(arrival_time=50.0, run_arrival_time=1.0)
    new_run = stage_request(arrival_time=10.0, run_arrival_time=10.0)

    assert policy("program-fcfs").key(old_run) < policy("program-fcfs").key(new_run)


def test_program_order_takes_a_call_of_unknown_run_for_a_new_run() -> None:
    key = policy("program-fcfs").key
    unknown = stage_request(arrival_time=10.0)

    assert key(stage_request(arrival_time=20.0, run_arrival_time=9.0)) < key(unknown)
    assert key(unknown) < key(stage_request(arrival_time=20.0, run_arrival_time=11.0))


@pytest.mark.parametrize(("name", "field"), [("plas", "attained_s"), ("atlas", "attained_path_s")])
@given(arrival=instants, less=seconds, more=seconds)
def test_of_calls_that_come_together_the_run_that_attained_less_goes_first(
    name: str, field: str, arrival: float, less: float, more: float
) -> None:
    less, more = sorted((less, more))
    first, second = (
        stage_request(arrival_time=arrival)._replace(**{field: s}) for s in (less, more)
    )

    assert policy(name).key(first) <= policy(name).key(second)


@pytest.mark.parametrize(("name", "field"), [("plas", "attained_s"), ("atlas", "attained_path_s")])
@given(attained=st.floats(0.0, 1e3), ratio=st.floats(0.0, 1e3))
def test_a_call_lets_newer_runs_pass_for_so_many_times_what_its_run_attained(
    name: str, field: str, attained: float, ratio: float
) -> None:
    key = policy(name, starvation_ratio=ratio).key
    call = stage_request(arrival_time=100.0)._replace(**{field: attained})
    wait_s = ratio * attained

    assert key(call) <= key(stage_request(arrival_time=100.0 + wait_s + 0.001))
    if wait_s > 0.01:
        assert key(stage_request(arrival_time=100.0 + wait_s - 0.001)) < key(call)


def test_atlas_does_not_put_off_a_run_for_being_parallel() -> None:
    fanned_out = stage_request(attained_s=20.0, attained_path_s=2.0)
    in_a_row = stage_request(attained_s=5.0, attained_path_s=5.0)

    assert policy("atlas").key(fanned_out) < policy("atlas").key(in_a_row)
    assert policy("plas").key(in_a_row) < policy("plas").key(fanned_out)


def test_sjf_runs_the_shorter_call_first_however_long_its_run_and_however_late_it_comes() -> None:
    short = stage_request(arrival_time=900.0, service_s=1.0, rest_s=500.0)
    long = stage_request(arrival_time=0.0, service_s=2.0)

    assert policy("sjf").key(short) < policy("sjf").key(long)


def test_shortest_remaining_counts_the_rest_of_the_run() -> None:
    nearly_done = stage_request(service_s=9.0, rest_s=0.0)
    just_begun = stage_request(service_s=1.0, rest_s=10.0)

    assert policy("shortest-remaining").key(nearly_done) < policy("shortest-remaining").key(
        just_begun
    )


@pytest.mark.parametrize("name", ["sjf", "shortest-remaining"])
def test_a_call_of_unknown_length_counts_as_one_of_that_patience(name: str) -> None:
    key = policy(name, patience_s=60.0).key

    assert key(stage_request(service_s=59.0)) < key(stage_request())
    assert key(stage_request()) < key(stage_request(service_s=61.0))


def test_urgency_of_a_run_that_is_late_already_goes_by_how_late_it_is() -> None:
    later = stage_request(arrival_time=100.0, deadline=50.0, service_s=1.0, rest_s=99.0)
    late = stage_request(arrival_time=100.0, deadline=90.0, service_s=30.0, rest_s=0.0)

    assert policy("urgency").key(later) < policy("urgency").key(late)


def test_urgency_runs_the_longer_call_first_where_a_miss_is_predicted() -> None:
    # As published: 10 s are left for 20 s of work, so each call's share is half of what it needs.
    short = stage_request(deadline=10.0, service_s=2.0, rest_s=18.0)
    long = stage_request(deadline=10.0, service_s=18.0, rest_s=2.0)

    assert policy("urgency").key(long) < policy("urgency").key(short)
