from __future__ import annotations

import math
import statistics

import pytest

from tests.sim.builders import trace_call, trace_run
from vllm_workflow.core.errors import ConfigError
from vllm_workflow.sim.hints import noisy_lengths, true_lengths

CALLS = [trace_call(f"c{i}", output=100) for i in range(400)]
RUN = trace_run("run", *CALLS)


def test_oracle_announces_the_truth() -> None:
    assert true_lengths(RUN, CALLS[0]) == 100.0


def test_noise_has_median_one_and_the_spread_asked_for() -> None:
    logs = [math.log(noisy_lengths(0.5)(RUN, call) / 100) for call in CALLS]

    assert statistics.median(logs) == pytest.approx(0.0, abs=0.08)
    assert statistics.stdev(logs) == pytest.approx(0.5, rel=0.1)


def test_call_has_the_same_error_whatever_else_is_asked() -> None:
    mild, strong = noisy_lengths(0.2, seed=3), noisy_lengths(0.4, seed=3)
    for call in CALLS[:5]:
        mild(RUN, call)

    each = noisy_lengths(0.2, seed=3)(RUN, CALLS[7])

    assert mild(RUN, CALLS[7]) == each
    assert math.log(strong(RUN, CALLS[7]) / 100) == pytest.approx(2 * math.log(each / 100))
    assert noisy_lengths(0.2, seed=4)(RUN, CALLS[7]) != each


@pytest.mark.parametrize("sigma", [-0.1, math.nan, math.inf])
def test_impossible_noise_is_an_error(sigma: float) -> None:
    with pytest.raises(ConfigError, match="sigma: expected a number from 0"):
        noisy_lengths(sigma)
