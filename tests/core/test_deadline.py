import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_workflow.core.deadline import proportional_budget_s, slack_s

seconds = st.floats(0.0, 1e6)


def test_slack_is_what_deadline_and_predictions_leave() -> None:
    assert slack_s(deadline=100.0, now=60.0, finish_s=5.0, rest_s=10.0) == 25.0
    assert slack_s(deadline=100.0, now=90.0, finish_s=5.0, rest_s=10.0) == -5.0
    assert slack_s(deadline=math.inf, now=90.0, finish_s=5.0, rest_s=10.0) == math.inf


@given(
    budget_s=st.floats(1e-3, 1e6),
    service_s=st.floats(1e-3, 1e6),
    rest_s=st.just(0.0) | st.floats(1e-3, 1e6),
)
def test_the_shares_of_call_and_rest_make_up_the_budget(
    budget_s: float, service_s: float, rest_s: float
) -> None:
    share = proportional_budget_s(budget_s, service_s, rest_s)
    rest = proportional_budget_s(budget_s, rest_s, service_s) if rest_s else 0.0

    assert share > 0.0
    assert share + rest == pytest.approx(budget_s)


def test_a_call_of_unknown_service_may_use_what_the_rest_leaves() -> None:
    assert proportional_budget_s(30.0, 0.0, 10.0) == 20.0
    assert proportional_budget_s(30.0, 0.0, 50.0) == 0.0


@given(service_s=seconds, rest_s=seconds)
def test_a_spent_or_endless_budget_is_not_split(service_s: float, rest_s: float) -> None:
    assert proportional_budget_s(-7.0, service_s, rest_s) == -7.0
    assert proportional_budget_s(math.inf, service_s, rest_s) == math.inf
