import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_workflow.core.histogram import BUCKETS_PER_OCTAVE, LEAST, MEMORY, Histogram

BUCKET = 2.0 ** (1.0 / BUCKETS_PER_OCTAVE)
values = st.floats(0.0, 1e8)


def of(*seen: float) -> Histogram:
    made = Histogram()
    for value in seen:
        made.add(value)
    return made


def test_of_nothing_nothing_is_known() -> None:
    assert Histogram().mean is None
    assert Histogram().quantile(0.5) is None


@given(st.lists(values, min_size=1, max_size=50), st.floats(0.0, 1.0))
def test_a_quantile_is_within_a_bucket_of_a_value_at_its_rank(
    seen: list[float], share: float
) -> None:
    quantile = of(*seen).quantile(share)

    assert quantile is not None
    # Weights differ by less than the 50 values have grown: ranks by a few.
    slack = 1.0 - (1.0 - 1.0 / MEMORY) ** len(seen)
    ordered = sorted(seen)
    low = ordered[max(0, math.floor((share - slack) * len(seen)) - 1)]
    high = ordered[min(len(seen) - 1, math.ceil((share + slack) * len(seen)))]
    assert low / BUCKET - LEAST <= quantile <= high * BUCKET + LEAST


@given(st.lists(values, min_size=1, max_size=50))
def test_quantiles_do_not_fall(seen: list[float]) -> None:
    histogram = of(*seen)
    quantiles = [histogram.quantile(share / 10) or 0.0 for share in range(11)]

    assert quantiles == sorted(quantiles)


@given(st.floats(0.01, 1e8), st.integers(1, 1000))
def test_the_mean_of_equal_values_is_exact_however_many(value: float, number: int) -> None:
    assert of(*[value] * number).mean == pytest.approx(value)


def test_old_values_fade() -> None:
    histogram = of(*[10.0] * 5000, *[1000.0] * 500)

    assert histogram.quantile(0.5) == pytest.approx(1000.0, rel=0.2)
    assert histogram.mean is not None
    assert histogram.mean > 900.0


def test_weight_counts_up_to_the_memory() -> None:
    assert of(*[1.0] * 5).weight == pytest.approx(5.0, rel=0.02)
    assert of(*[1.0] * 100_000).weight == pytest.approx(MEMORY, rel=0.01)


@given(st.lists(values, max_size=400))
def test_what_is_written_down_is_read_back(seen: list[float]) -> None:
    histogram = of(*seen)
    again = Histogram.from_mapping(histogram.to_mapping())

    assert again.num_values == histogram.num_values
    for share in (0.1, 0.5, 0.9):
        assert again.quantile(share) == pytest.approx(histogram.quantile(share))
    assert again.mean == pytest.approx(histogram.mean)


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"num_values": 1, "sum": math.nan, "weights": []},
        {"num_values": 1, "sum": 1.0, "weights": [[1]]},
        {"num_values": 1, "sum": 1.0, "weights": [[1, -1.0]]},
        {"num_values": 1, "sum": 1.0, "weights": [[1, "a"]]},
    ],
)
def test_what_is_no_histogram_is_refused(data: dict[str, object]) -> None:
    with pytest.raises((KeyError, TypeError, ValueError)):
        Histogram.from_mapping(data)


def test_memory_is_bounded_whatever_is_seen() -> None:
    histogram = of(*(math.exp(0.01 * (i % 4000) - 10.0) for i in range(20_000)))

    assert histogram.mean is not None  # which sorts in what is new
    assert len(histogram._weights) <= 41 * BUCKETS_PER_OCTAVE
