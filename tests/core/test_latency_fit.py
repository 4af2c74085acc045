"""Fitting: known models are found again, from steps and from request timestamps alone."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_workflow.core.errors import ConfigError
from vllm_workflow.core.fit import Observation, StepLoad, evaluate, fit
from vllm_workflow.core.latency import LatencyModel, prefill_attention
from vllm_workflow.core.nnls import solve_nonnegative
from vllm_workflow.core.windows import RequestTiming, decode_windows

TRUE = LatencyModel(
    overhead_s=0.001,
    weights_s=0.009,
    per_token_s=50e-6,
    per_token_below_knee_s=20e-6,
    num_knee_tokens=256,
    per_seq_s=20e-6,
    per_kv_token_s=0.1e-6,
    per_prefill_kv_token_s=0.003e-6,
)
PRIOR = replace(
    TRUE,
    weights_s=0.012,
    per_token_s=40e-6,
    per_token_below_knee_s=16e-6,
    per_kv_token_s=0.08e-6,
    per_seq_s=12e-6,
)


def random_load(rng: random.Random) -> StepLoad:
    num_prompt = rng.choice([0, 0, 64, 500, 1800])
    num_seqs = rng.randrange(1, 128)
    return StepLoad(
        num_prefill_tokens=num_prompt,
        num_decode_seqs=num_seqs,
        num_kv_tokens=num_seqs * rng.randrange(64, 8000),
        prefill_attention=prefill_attention(num_prompt, rng.randrange(8000)),
    )


def observed(load: StepLoad, *, noise: float = 1.0, request_s: float = 0.0) -> Observation:
    plain = Observation(seconds=1.0, loads=(load,), num_requests=1.0 if request_s else 0.0)
    return replace(plain, seconds=noise * plain.predicted_s(TRUE, request_s))


def steps(number: int, *, noise: float = 0.0, seed: int = 0) -> list[Observation]:
    rng = random.Random(seed)
    return [
        observed(random_load(rng), noise=math.exp(rng.gauss(0.0, noise))) for _ in range(number)
    ]


@pytest.mark.parametrize("prior", [PRIOR, None], ids=["with a prior", "without"])
def test_a_known_model_is_found_again_from_its_steps(prior: LatencyModel | None) -> None:
    fitted = fit(steps(300), prior)

    assert evaluate(steps(100, seed=1), fitted.latency).mean_error < 0.02
    assert fitted.mean_error < 0.02
    assert fitted.latency.per_kv_token_s == pytest.approx(TRUE.per_kv_token_s, rel=0.05)
    assert fitted.latency.knee_tokens == pytest.approx(256, rel=0.5)


def test_noise_of_ten_percent_hardly_moves_a_fit() -> None:
    fitted = fit(steps(300, noise=0.1), PRIOR)

    assert evaluate(steps(100, seed=1), fitted.latency).mean_error < 0.04


def test_what_a_request_costs_beside_its_steps_is_found() -> None:
    rng = random.Random(0)
    first_tokens = [
        observed(
            StepLoad(num_prefill_tokens=n, prefill_attention=prefill_attention(n)), request_s=0.02
        )
        for n in (rng.randrange(16, 2000) for _ in range(50))
    ]

    assert fit([*steps(100), *first_tokens], PRIOR).request_s == pytest.approx(0.02, rel=0.1)


def test_a_coefficient_that_nothing_speaks_of_stays_at_the_prior() -> None:
    decodes = [observed(StepLoad(num_decode_seqs=b, num_kv_tokens=b * 1000)) for b in range(1, 60)]
    fitted = fit(decodes, PRIOR)

    assert fitted.latency.per_prefill_kv_token_s == pytest.approx(PRIOR.per_prefill_kv_token_s)
    assert fitted.latency.knee_tokens == pytest.approx(PRIOR.knee_tokens)


def test_one_observation_moves_the_prior_towards_it() -> None:
    (one,) = steps(1)
    fitted = fit([one], PRIOR)

    error_before = abs(one.predicted_s(PRIOR) / one.seconds - 1.0)
    assert fitted.mean_error < error_before


@given(
    st.lists(
        st.builds(
            Observation,
            seconds=st.floats(1e-4, 100.0),
            loads=st.tuples(
                st.builds(
                    StepLoad,
                    count=st.floats(0.1, 1000.0),
                    num_prefill_tokens=st.floats(0.0, 8192.0),
                    num_decode_seqs=st.floats(0.0, 256.0),
                    num_kv_tokens=st.floats(0.0, 1e6),
                    prefill_attention=st.floats(0.0, 1e8),
                )
            ),
        ),
        min_size=1,
        max_size=12,
    )
)
def test_whatever_is_observed_a_fit_is_a_model(observations: list[Observation]) -> None:
    fitted = fit(observations, PRIOR)

    assert fitted.latency.step_s(num_decode_seqs=1, num_kv_tokens=100) > 0.0
    assert fitted.num_observations == len(observations)


@given(
    rows=st.lists(st.lists(st.floats(-1.0, 1.0), min_size=4, max_size=4), min_size=1, max_size=12),
    right=st.lists(st.floats(-1.0, 1.0), min_size=12, max_size=12),
)
def test_a_solution_is_not_negative_and_no_coordinate_can_improve_it(
    rows: list[list[float]], right: list[float]
) -> None:
    gram = [[sum(r[i] * r[j] for r in rows) + 0.1 * (i == j) for j in range(4)] for i in range(4)]
    moment = [sum(r[i] * y for r, y in zip(rows, right)) for i in range(4)]
    x = solve_nonnegative(gram, moment)

    for i in range(4):
        gain = moment[i] - sum(gram[i][k] * x[k] for k in range(4))
        assert x[i] >= 0.0
        assert gain <= 1e-7
        assert x[i] == 0.0 or gain >= -1e-7


def lone_stream(num_seqs: int, *, num_prompt: int, num_output: int, begin: float) -> RequestTiming:
    """One of `num_seqs` equal requests that decode together, undisturbed."""
    decode_s = sum(
        TRUE.step_s(num_decode_seqs=num_seqs, num_kv_tokens=num_seqs * (num_prompt + k))
        for k in range(1, num_output)
    )
    return RequestTiming(
        first_token_time=begin,
        last_token_time=begin + decode_s,
        num_prompt_tokens=num_prompt,
        num_output_tokens=num_output,
    )


def test_the_steps_of_an_undisturbed_batch_follow_from_its_timestamps() -> None:
    batch = [lone_stream(5, num_prompt=700, num_output=41, begin=10.0) for _ in range(5)]
    windows = decode_windows(batch, max_num_batched_tokens=2048)

    assert len(windows) == 5
    for window in windows:
        assert window.predicted_s(TRUE) == pytest.approx(window.seconds, rel=1e-9)
        assert sum(load.count for load in window.loads) == 40


def test_a_prompt_that_comes_between_is_a_step_with_prefill() -> None:
    resident = replace(
        lone_stream(1, num_prompt=100, num_output=101, begin=0.0), last_token_time=2.0
    )
    guest = RequestTiming(
        first_token_time=1.0, last_token_time=1.0, num_prompt_tokens=3000, num_output_tokens=1
    )
    window, *_ = decode_windows([resident, guest], max_num_batched_tokens=2048)

    prefills = [load for load in window.loads if load.num_prefill_tokens]
    assert sum(load.num_prefill_tokens for load in prefills) == 3000
    assert sum(load.prefill_attention for load in prefills) == prefill_attention(3000)
    assert max(load.num_prefill_tokens + load.num_decode_seqs for load in prefills) == 2048
    assert sum(load.count for load in window.loads) == 100


def test_cached_prompt_tokens_are_not_computed() -> None:
    resident = replace(
        lone_stream(1, num_prompt=100, num_output=101, begin=0.0), last_token_time=2.0
    )
    guest = RequestTiming(
        first_token_time=1.0,
        last_token_time=1.0,
        num_prompt_tokens=1000,
        num_output_tokens=1,
        num_cached_tokens=900,
    )
    window, *_ = decode_windows([resident, guest], max_num_batched_tokens=2048)

    (prefill,) = [load for load in window.loads if load.num_prefill_tokens]
    assert prefill.num_prefill_tokens == 100
    assert prefill.prefill_attention == prefill_attention(100, 900)


@given(
    st.lists(
        st.builds(
            lambda first, decode_s, p, o: RequestTiming(
                first_token_time=first,
                last_token_time=first + decode_s,
                num_prompt_tokens=p,
                num_output_tokens=o,
            ),
            first=st.floats(0.0, 5.0),
            decode_s=st.floats(0.0, 5.0),
            p=st.integers(0, 20_000),
            o=st.integers(0, 300),
        ),
        max_size=12,
    )
)
def test_a_window_has_as_many_steps_as_its_request_decoded(timings: list[RequestTiming]) -> None:
    targets = [t for t in timings if t.num_steps >= 8 and t.decode_s > 0.0]
    windows = decode_windows(timings, max_num_batched_tokens=2048)

    assert len(windows) == len(targets)
    for window, target in zip(windows, targets):
        assert sum(load.count for load in window.loads) == pytest.approx(target.num_steps)
        assert all(load.count >= 0.0 for load in window.loads)


@pytest.mark.parametrize(
    ("observations", "prior", "message"),
    [
        ([], PRIOR, "expected at least 1 observations, got 0"),
        (steps(7), None, "expected at least 8 observations, got 7"),
        (
            [replace(steps(1)[0], seconds=-1.0)],
            PRIOR,
            "observation 0: seconds: expected a number above 0, got -1.0",
        ),
        (
            [
                observed(StepLoad(num_kv_tokens=5)),
                Observation(seconds=1.0, loads=(StepLoad(num_kv_tokens=-5),)),
            ],
            PRIOR,
            "observation 1: loads: expected numbers from 0, got -5",
        ),
    ],
    ids=["none", "too few", "negative time", "negative load"],
)
def test_observations_that_make_no_sense_are_named(
    observations: list[Observation], prior: LatencyModel | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        fit(observations, prior)


def test_a_request_that_ends_before_it_begins_cannot_be_built() -> None:
    with pytest.raises(ConfigError, match="last_token_time: expected at least first_token_time"):
        RequestTiming(
            first_token_time=2.0, last_token_time=1.0, num_prompt_tokens=1, num_output_tokens=2
        )
