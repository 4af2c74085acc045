import math
import statistics
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_workflow.core.errors import ConfigError
from vllm_workflow.sim.replicates import estimate, lower_bound, replicate, student_quantile
from vllm_workflow.sim.types import TraceRun


def arriving(*arrivals: float | None) -> list[TraceRun]:
    return [
        TraceRun(run_id=f"r{i}", workflow="w", calls=(), arrival_s=arrival)
        for i, arrival in enumerate(arrivals)
    ]


def test_the_first_arrangement_is_the_window_as_it_was() -> None:
    runs = arriving(1.0, 2.0, 5.0)

    assert replicate(runs, 0) == tuple(runs)


@given(
    gaps=st.lists(st.floats(0.0, 100.0), min_size=1, max_size=30),
    number=st.integers(1, 5),
    seed=st.integers(0, 5),
)
@settings(max_examples=60)
def test_an_arrangement_has_the_same_runs_and_pauses(
    gaps: list[float], number: int, seed: int
) -> None:
    times = [sum(gaps[: i + 1]) for i in range(len(gaps))]

    arranged = replicate(arriving(*times), number, seed)

    arrivals = [run.arrival_s or 0.0 for run in arranged]
    assert sorted(run.run_id for run in arranged) == sorted(f"r{i}" for i in range(len(gaps)))
    assert arrivals == sorted(arrivals)
    again = [b - a for a, b in pairwise(arrivals)]
    assert sorted(again) == pytest.approx(sorted(b - a for a, b in pairwise(times)), abs=1e-6)
    assert arranged == replicate(arriving(*times), number, seed)


def test_two_arrangements_differ() -> None:
    runs = arriving(*(float(i * i) for i in range(20)))

    assert len({replicate(runs, number) for number in range(5)}) == 5


def test_a_burst_stays_a_burst() -> None:
    runs = arriving(0.0, 0.1, 0.2, 0.3, 50.0, 100.0, 150.0, 200.0)

    times = [run.arrival_s or 0.0 for run in replicate(runs, 1)]

    gaps = [later - earlier for earlier, later in pairwise(times)]
    short = [i for i, gap in enumerate(gaps) if gap < 1.0]
    assert len(short) == 3
    assert (short[-1] - short[0]) % 7 in {2, 5, 6}  # side by side, maybe around the end


def test_a_run_without_arrival_is_named() -> None:
    with pytest.raises(ConfigError, match="run 'r1': expected an arrival, got none"):
        replicate(arriving(0.0, None), 1)


@pytest.mark.parametrize(
    ("share", "num_degrees", "expected"),
    [
        (0.95, 1, 6.3138),
        (0.975, 2, 4.3027),
        (0.95, 5, 2.0150),
        (0.975, 4, 2.7764),
        (0.995, 9, 3.2498),
        (0.95, 30, 1.6973),
        (0.5, 3, 0.0),
    ],
)
def test_student_quantiles_are_those_of_the_tables(
    share: float, num_degrees: int, expected: float
) -> None:
    assert student_quantile(share, num_degrees) == pytest.approx(expected, abs=2e-4)


def test_an_interval_is_symmetric_and_its_lower_end_is_the_one_sided_bound() -> None:
    values = [1.0, 2.0, 4.0, 5.0]

    found = estimate(values, 0.9)

    assert found.mean == statistics.fmean(values)
    assert found.mean - found.low == pytest.approx(found.high - found.mean)
    assert lower_bound(values, 0.95) == pytest.approx(found.low)


def test_one_value_says_nothing_of_its_error() -> None:
    assert estimate([3.0]).low == -math.inf
    assert lower_bound([3.0], 0.95) == -math.inf


def test_intervals_hold_the_true_mean_as_often_as_they_say() -> None:
    from vllm_workflow.sim.rng import stream

    rng = stream(0, "coverage")
    held = 0
    for _ in range(2000):
        found = estimate([rng.gauss(7.0, 3.0) for _ in range(5)], 0.9)
        held += found.low <= 7.0 <= found.high
    assert held / 2000 == pytest.approx(0.9, abs=0.02)
