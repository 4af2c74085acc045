"""When runs begin."""

from __future__ import annotations

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_workflow.core.errors import ConfigError
from vllm_workflow.sim.arrivals import arrival_times, with_arrivals
from vllm_workflow.sim.types import Trace, TraceCall, TraceRun

rates = st.floats(min_value=1e-3, max_value=1e3)
shapes = st.floats(min_value=0.05, max_value=50.0)
seeds = st.integers(min_value=0, max_value=2**32)


def trace(*arrivals: float | None) -> Trace:
    call = TraceCall(call_id="a", stage="s", num_prompt_tokens=1, num_output_tokens=1)
    runs = tuple(
        TraceRun(run_id=f"r{i}", workflow="w", calls=(call,), arrival_s=arrival)
        for i, arrival in enumerate(arrivals)
    )
    return Trace(runs=runs, source="t")


def gaps(times: list[float]) -> list[float]:
    return [b - a for a, b in zip([0.0, *times], times)]


@given(st.integers(min_value=1, max_value=200), rates, shapes, seeds)
def test_runs_arrive_in_order_and_the_last_one_when_the_rate_says(
    num_runs: int, rate: float, burstiness: float, seed: int
) -> None:
    times = arrival_times(num_runs, request_rate=rate, burstiness=burstiness, seed=seed)

    assert len(times) == num_runs
    assert times == sorted(times)
    assert times[0] >= 0.0
    assert times[-1] == pytest.approx(num_runs / rate)


@given(rates, shapes, seeds)
def test_another_rate_only_stretches_the_pattern(rate: float, burstiness: float, seed: int) -> None:
    slow = arrival_times(30, request_rate=1.0, burstiness=burstiness, seed=seed)
    fast = arrival_times(30, request_rate=rate, burstiness=burstiness, seed=seed)

    assert fast == pytest.approx([time / rate for time in slow])


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_the_gaps_vary_as_burstiness_says(burstiness: float) -> None:
    each = gaps(arrival_times(20_000, request_rate=5.0, burstiness=burstiness, seed=3))

    # A gamma distribution of shape k has mean / standard deviation = sqrt(k).
    ratio = statistics.mean(each) / statistics.pstdev(each)
    assert ratio == pytest.approx(math.sqrt(burstiness), rel=0.05)


def test_seeds_give_patterns_of_their_own() -> None:
    assert arrival_times(5, request_rate=1.0, seed=1) != arrival_times(5, request_rate=1.0, seed=2)


def test_infinite_burstiness_makes_all_gaps_equal() -> None:
    assert arrival_times(3, request_rate=2.0, burstiness=math.inf) == [0.5, 1.0, 1.5]


def test_an_infinite_rate_lets_all_arrive_at_once() -> None:
    assert arrival_times(3, request_rate=math.inf) == [0.0, 0.0, 0.0]


@given(seeds)
def test_bursts_beyond_the_range_of_floats_still_end_in_time(seed: int) -> None:
    times = arrival_times(3, request_rate=2.0, burstiness=1e-6, seed=seed)

    assert times[-1] == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"request_rate": 0.0}, "request rate: expected a number above 0, got 0.0"),
        ({"request_rate": math.nan}, "request rate: expected a number above 0, got nan"),
        ({"request_rate": 1.0, "burstiness": -1.0}, "burstiness: expected a number above 0"),
    ],
)
def test_a_rate_that_makes_no_sense_is_named(fields: dict[str, float], wanted: str) -> None:
    with pytest.raises(ConfigError, match=wanted):
        arrival_times(3, **fields)


def test_a_trace_keeps_its_own_times_unless_a_rate_is_given() -> None:
    own = trace(1.0, 2.0)

    assert with_arrivals(own) is own
    assert [r.arrival_s for r in with_arrivals(own, math.inf).runs] == [0.0, 0.0]


def test_a_trace_without_times_needs_a_rate() -> None:
    with pytest.raises(ConfigError, match="t: has no arrivals; expected a request rate"):
        with_arrivals(trace(None))
