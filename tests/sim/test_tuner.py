import math
from dataclasses import replace

import pytest

from tests.sim.tuner_builders import HEXGEN, window
from vllm_workflow.core.config import PRESETS
from vllm_workflow.core.errors import ConfigError
from vllm_workflow.core.policy_grid import default_grid, points
from vllm_workflow.sim.replicates import replicate
from vllm_workflow.sim.simulator import simulate
from vllm_workflow.sim.tuner import RUNGS, TunerSettings, tune

BLIND = replace(HEXGEN, alpha=0.0)
"""Sees queued work alone, not that one instance is eight times as fast."""


def attainment(policy, runs) -> float:  # type: ignore[no-untyped-def]
    results = simulate(runs, window().fleet, policy).runs
    return sum(r.latency_s <= (r.slo_s or 0.0) for r in results) / len(results)


def test_a_wrong_alpha_is_replaced_by_one_that_is_better_on_fresh_traffic() -> None:
    verdict = tune(window(), BLIND, points(BLIND, default_grid(BLIND)))

    assert verdict.swap, verdict.reason
    assert verdict.policy.alpha > 0.0
    assert verdict.gain_low is not None
    assert verdict.gain_low > TunerSettings().min_gain
    fresh = replicate(window().runs, 77, seed=5)
    assert attainment(verdict.policy, fresh) > attainment(BLIND, fresh)


def test_a_policy_that_does_the_same_is_not_swapped_in() -> None:
    same = replace(HEXGEN, patience_s=30.0)  # every run has a deadline: nobody feels it

    verdict = tune(window(), HEXGEN, [HEXGEN, same])

    assert not verdict.swap
    assert verdict.policy == HEXGEN
    assert verdict.gain == 0.0


def test_a_worse_policy_is_not_swapped_in() -> None:
    verdict = tune(window(), PRESETS["predicted-finish"], [BLIND])

    assert not verdict.swap
    assert verdict.gain is not None
    assert verdict.gain < 0.0
    assert "not more than" in verdict.reason


def test_a_gain_below_the_least_that_a_change_must_bring_is_not_enough() -> None:
    verdict = tune(window(), BLIND, [replace(HEXGEN, alpha=0.9)], TunerSettings(min_gain=2.0))

    assert not verdict.swap


def test_the_luckiest_of_many_that_are_alike_is_not_swapped_in() -> None:
    """`power-of-two` with another seed is as good: what differs from draw to draw is chance."""
    draws = [replace(PRESETS["power-of-two"], seed=seed) for seed in range(10)]
    busy = window(80, rate=2.0, slo_s=2.0)
    shares = [attainment(draw, busy.runs) for draw in draws]
    assert max(shares) - min(shares) > 0.04

    for present in draws[:5]:
        assert not tune(busy, present, draws).swap


def test_equal_arguments_give_equal_verdicts() -> None:
    grid = points(BLIND, {"alpha": [0.2, 0.5, 0.9]})

    assert tune(window(), BLIND, grid) == tune(window(), BLIND, grid)


def test_the_present_policy_is_among_the_finalists() -> None:
    verdict = tune(window(), HEXGEN, points(HEXGEN, default_grid(HEXGEN)))

    finalists = [point.policy for point in verdict.points if point.rung == len(RUNGS) + 1]
    assert len(finalists) == 2
    assert HEXGEN in finalists


def test_every_point_is_told_of_once_with_what_it_changes() -> None:
    grid = points(HEXGEN, default_grid(HEXGEN))

    verdict = tune(window(), HEXGEN, grid)

    assert sorted(p.policy.alpha for p in verdict.points) == sorted(p.alpha for p in grid)
    assert all(p.changes == {"alpha": p.policy.alpha} for p in verdict.points if p.policy != HEXGEN)


def test_too_few_runs_say_nothing() -> None:
    verdict = tune(window(29), BLIND, [HEXGEN])

    assert (verdict.swap, verdict.num_calls) == (False, 0)
    assert verdict.reason == "29 runs, of at least 30"


def test_runs_that_the_window_cuts_off_are_load_only() -> None:
    whole = window()
    cut = replace(whole, uncounted=frozenset(run.run_id for run in whole.runs[::2]))

    assert (
        tune(cut, BLIND, [HEXGEN], TunerSettings(min_runs=31)).reason == "30 runs, of at least 31"
    )
    seeing = replace(HEXGEN, alpha=0.8)
    assert tune(cut, BLIND, [seeing]).gain != tune(whole, BLIND, [seeing]).gain
    assert tune(cut, BLIND, [seeing]).num_calls == tune(whole, BLIND, [seeing]).num_calls


def test_without_promises_the_p95_decides() -> None:
    verdict = tune(window(slo_s=None), BLIND, [replace(HEXGEN, alpha=0.8)])

    assert verdict.swap, verdict.reason
    assert all(point.score.attainment is None for point in verdict.points)


def test_runs_that_are_refused_are_missed_and_do_not_make_a_gain_endless() -> None:
    """Far more than one run in twenty is refused, by both policies."""
    present = replace(PRESETS["workflow"], admission="reject")
    crowd = window(120, rate=8.0)
    results = simulate(crowd.runs, crowd.fleet, present).runs
    assert sum(not run.finished for run in results) > 0.05 * len(results)

    verdict = tune(
        crowd, present, [replace(present, relegate=False, admission="accept"), PRESETS["workflow"]]
    )

    assert verdict.gain is not None
    assert math.isfinite(verdict.gain)
    assert all(
        math.isfinite(point.score.gain) and math.isfinite(point.score.p95_s)
        for point in verdict.points
    )


def test_engines_keep_their_own_policy() -> None:
    """Without late binding the order is the engines' affair alone."""
    busy = window(rate=8.0)
    present, other = HEXGEN, replace(HEXGEN, ordering="sjf")

    follows = tune(busy, present, [other])
    keeps = tune(replace(busy, engine_policy=present), present, [other])

    assert follows.gain != 0.0
    assert keeps.gain == 0.0


@pytest.mark.parametrize(
    "field", [{"confidence": 1.0}, {"min_gain": -0.1}, {"num_replicates": 2}, {"min_runs": 0}]
)
def test_settings_that_make_no_sense_are_explained(field: dict[str, float]) -> None:
    (name,) = field

    with pytest.raises(ConfigError, match=f"{name}: expected .*, got"):
        TunerSettings(**field)  # type: ignore[arg-type]
