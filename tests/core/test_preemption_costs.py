"""What preempting costs, and when it pays."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_workflow.core.preemption import MAX_RUNS, MIN_GAIN, PreemptionCosts


def test_while_nothing_is_measured_every_preemption_pays() -> None:
    costs = PreemptionCosts(10.0)

    assert costs.recompute_s(10_000) == 0.0
    assert costs.wait_s(9.0) == math.inf
    assert costs.pays(1e9, 9.0)


def test_one_end_of_a_call_says_nothing_of_how_often_they_end() -> None:
    costs = PreemptionCosts(10.0)
    costs.note_departure(5.0)

    assert costs.wait_s(9.0) == math.inf


def test_the_price_of_a_token_is_that_of_recent_steps() -> None:
    costs = PreemptionCosts(10.0)
    for _ in range(500):
        costs.note_prefill(1.0, 1_000)
    for _ in range(500):
        costs.note_prefill(4.0, 1_000)

    assert costs.recompute_s(1_000) == pytest.approx(4.0, rel=1e-3)


@pytest.mark.parametrize("step", [(0.0, 5), (-1.0, 5), (math.inf, 5), (math.nan, 5), (1.0, 0)])
def test_a_step_that_makes_no_sense_teaches_nothing(step: tuple[float, int]) -> None:
    costs = PreemptionCosts(10.0)
    costs.note_prefill(*step)

    assert costs.recompute_s(1) == 0.0


def test_the_wait_is_the_mean_of_the_latest_gaps() -> None:
    costs = PreemptionCosts(10.0)
    for now in (0.0, 500.0, *(1_000.0 + 2.0 * i for i in range(9))):
        costs.note_departure(now)

    assert costs.wait_s(1_016.0) == pytest.approx(2.0)
    assert costs.pays(2.0 / MIN_GAIN, 1_016.0)
    assert not costs.pays(1.01 * 2.0 / MIN_GAIN, 1_016.0)


def test_calls_that_ended_in_one_step_do_not_say_that_the_next_ends_at_once() -> None:
    costs = PreemptionCosts(10.0)
    for _ in range(9):
        costs.note_departure(100.0)

    assert not costs.pays(1.0, 100.0)
    assert costs.wait_s(3_700.0) == pytest.approx(450.0)
    assert costs.pays(1.0, 3_700.0)


@given(st.lists(st.floats(0.0, 20.0), max_size=30), st.floats(0.0, 50.0))
def test_a_run_never_loses_more_than_its_bound(losses: list[float], bound_s: float) -> None:
    costs, lost_s = PreemptionCosts(bound_s), 0.0
    for loss_s in losses:
        if costs.may_lose("run", loss_s):
            costs.charge("run", loss_s)
            lost_s += loss_s

    assert lost_s <= bound_s
    assert costs.may_lose("another", bound_s)


def test_of_very_many_runs_the_one_that_lost_least_recently_is_forgotten() -> None:
    costs = PreemptionCosts(1.0)
    for index in range(MAX_RUNS + 1):
        costs.charge(str(index), 1.0)

    assert costs.may_lose("0", 1.0)
    assert not costs.may_lose("1", 1.0)
