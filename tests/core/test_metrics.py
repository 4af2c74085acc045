from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_workflow.core import metrics

latencies = st.lists(st.one_of(st.floats(0.001, 1e6), st.just(math.inf)), max_size=40)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40), st.floats(0, 100))
def test_percentile_is_that_of_numpy(values: list[float], percent: float) -> None:
    wanted = float(np.percentile(values, percent))

    assert metrics.percentile(values, percent) == pytest.approx(wanted, rel=1e-9, abs=1e-9)


@given(latencies, st.floats(0, 100))
def test_percentile_is_never_nan_with_unfinished_runs(values: list[float], percent: float) -> None:
    found = metrics.percentile(values, percent)

    assert found is None if not values else not math.isnan(found or 0.0)


def test_percentile_next_to_an_unfinished_run_is_infinite() -> None:
    assert metrics.percentile([1.0, 2.0, math.inf], 75) == math.inf
    assert metrics.percentile([1.0, 2.0, math.inf], 50) == 2.0


def test_empty_sample_has_no_metric() -> None:
    assert metrics.percentile([], 95) is None
    assert metrics.mean([]) is None
    assert metrics.slo_attainment([], []) is None
    assert metrics.goodput([], [], 0.0) is None
    assert metrics.throughput([], 0.0) is None
    assert metrics.slo_scale_at(0.95, [], []) is None


def test_unfinished_run_is_an_arrival_that_missed() -> None:
    attained = metrics.slo_attainment([1.0, math.inf, 3.0, 5.0], [2.0, 2.0, 3.0, 4.0])

    assert attained == 0.5


def test_run_without_slo_is_neither_met_nor_missed() -> None:
    assert metrics.slo_attainment([1.0, 9.0], [2.0, None]) == 1.0
    assert metrics.slo_attainment([1.0], [None]) is None


def test_goodput_counts_what_met_and_throughput_what_ended() -> None:
    runs, slos = [1.0, 5.0, math.inf], [2.0, 2.0, 2.0]

    assert metrics.goodput(runs, slos, 10.0) == 0.1
    assert metrics.throughput(runs, 10.0) == 0.2


@given(latencies, st.floats(0.01, 1.0))
def test_slo_scale_is_the_smallest_that_attains_the_share(
    values: list[float], share: float
) -> None:
    references = [1.0 + i for i in range(len(values))]

    scale = metrics.slo_scale_at(share, values, references)

    if not values:
        assert scale is None
        return
    assert scale is not None

    def attained(scale: float) -> float:
        met = sum(v / r <= scale < math.inf for v, r in zip(values, references))
        return met / len(values)

    if scale == math.inf:
        assert attained(1e300) < share
    else:
        assert attained(scale) >= share - 1e-9
        assert attained(math.nextafter(scale, 0.0)) < share


def test_slo_scale_takes_whole_runs() -> None:
    ratios = [float(i) for i in range(1, 11)]

    assert metrics.slo_scale_at(0.95, ratios, [1.0] * 10) == 10.0
    assert metrics.slo_scale_at(0.9, ratios, [1.0] * 10) == 9.0


@pytest.mark.parametrize("share", [0.0, 1.1, math.nan])
def test_slo_scale_at_an_impossible_share_is_an_error(share: float) -> None:
    with pytest.raises(ValueError, match="share"):
        metrics.slo_scale_at(share, [1.0], [1.0])


def test_nan_latency_is_an_error() -> None:
    with pytest.raises(ValueError, match="did not end"):
        metrics.percentile([1.0, math.nan], 50)
