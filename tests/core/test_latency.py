import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_workflow.core.errors import ConfigError
from vllm_workflow.core.latency import LatencyModel, prefill_attention, shared_out

MODEL = LatencyModel(
    overhead_s=0.001,
    weights_s=0.010,
    per_token_s=0.0001,
    per_kv_token_s=1e-7,
    max_num_batched_tokens=1000,
)
FULL = LatencyModel(
    overhead_s=0.001,
    weights_s=0.010,
    per_token_s=0.0001,
    per_token_below_knee_s=0.00004,
    num_knee_tokens=200,
    per_seq_s=0.00001,
    per_kv_token_s=1e-7,
    per_prefill_kv_token_s=1e-9,
    max_num_batched_tokens=1000,
)
tokens = st.integers(0, 100_000)
prices = st.floats(0.0, 1e-3)
models = st.builds(
    lambda below, above, knee, **rest: LatencyModel(
        per_token_below_knee_s=min(below, above),
        per_token_s=max(below, above),
        num_knee_tokens=knee,
        **rest,
    ),
    below=prices,
    above=prices,
    knee=st.none() | st.floats(0.0, 5000.0),
    overhead_s=st.floats(0.0, 0.01),
    weights_s=st.floats(1e-4, 0.1),
    per_seq_s=prices,
    per_kv_token_s=prices,
    per_prefill_kv_token_s=prices,
    max_num_batched_tokens=st.integers(1, 16384),
)
loads = st.fixed_dictionaries(
    {
        "num_prefill_tokens": tokens,
        "num_decode_seqs": tokens,
        "num_kv_tokens": tokens,
        "prefill_attention": tokens,
    }
)


def test_below_the_knee_further_tokens_are_free() -> None:
    assert MODEL.step_s(num_decode_seqs=1) == MODEL.step_s(num_decode_seqs=100) == 0.011
    assert MODEL.step_s(num_prefill_tokens=200) == pytest.approx(0.021)


def test_an_empty_step_takes_time() -> None:
    assert MODEL.step_s() > 0.0


def test_a_long_prompt_is_prefilled_in_chunks() -> None:
    assert MODEL.prefill_s(2500) == pytest.approx(2 * 0.101 + 0.051)
    assert MODEL.prefill_s(2000) == pytest.approx(2 * 0.101)
    assert MODEL.prefill_s(0) == MODEL.prefill_s(1)


def test_decode_reads_the_context_of_every_sequence() -> None:
    alone_s = MODEL.decode_s(10, batch_size=1, num_context_tokens=1000)
    beside_s = MODEL.decode_s(10, batch_size=5, num_context_tokens=1000)

    assert alone_s == pytest.approx(10 * (0.011 + 1e-4))
    assert beside_s == pytest.approx(10 * (0.011 + 5e-4))


@given(fewer=tokens, more=tokens)
def test_more_tokens_never_take_less_time(fewer: int, more: int) -> None:
    fewer, more = sorted((fewer, more))

    assert MODEL.prefill_s(fewer) <= MODEL.prefill_s(more) + 1e-9
    assert MODEL.step_s(num_prefill_tokens=fewer) <= MODEL.step_s(num_prefill_tokens=more)
    assert MODEL.step_s(num_kv_tokens=fewer) <= MODEL.step_s(num_kv_tokens=more)


@given(
    model=models,
    load=loads,
    name=st.sampled_from(
        sorted(["num_prefill_tokens", "num_decode_seqs", "num_kv_tokens", "prefill_attention"])
    ),
    more=tokens,
)
def test_a_step_takes_time_and_never_less_for_more_of_anything(
    model: LatencyModel, load: dict[str, int], name: str, more: int
) -> None:
    step_s = model.step_s(**load)

    assert step_s > 0.0
    assert model.step_s(**load | {name: load[name] + more}) >= step_s * (1 - 1e-12)


@given(model=models, num_full=st.integers(0, 3), rest=st.integers(1, 20_000))
def test_a_prefill_takes_as_long_as_its_parts(
    model: LatencyModel, num_full: int, rest: int
) -> None:
    first = num_full * model.max_num_batched_tokens
    whole_s = model.prefill_s(first + rest)
    first_s = model.prefill_s(first) if first else 0.0

    assert whole_s == pytest.approx(first_s + model.prefill_s(rest, num_cached_tokens=first))


@given(model=models, num_tokens=st.integers(1, 20_000), num_cached=st.integers(0, 20_000))
def test_a_prefill_is_the_sum_of_its_steps(
    model: LatencyModel, num_tokens: int, num_cached: int
) -> None:
    if num_tokens > 50 * model.max_num_batched_tokens:
        num_tokens = 50 * model.max_num_batched_tokens
    steps_s, done = 0.0, 0
    while done < num_tokens:
        chunk = min(num_tokens - done, model.max_num_batched_tokens)
        attention = prefill_attention(chunk, num_cached + done)
        steps_s += model.step_s(num_prefill_tokens=chunk, prefill_attention=attention)
        done += chunk

    assert model.prefill_s(num_tokens, num_cached_tokens=num_cached) == pytest.approx(steps_s)


@given(model=models, num_tokens=st.floats(0.0, 20_000.0))
def test_a_token_above_the_knee_costs_no_less_than_one_below(
    model: LatencyModel, num_tokens: float
) -> None:
    knee = min(model.knee_tokens, 1e6)
    at_s, twice_s = (model.step_s(num_prefill_tokens=knee + k * num_tokens) for k in (0, 1))
    before_s = model.step_s(num_prefill_tokens=max(0.0, knee - num_tokens))

    if knee >= num_tokens:
        assert twice_s - at_s >= (at_s - before_s) * (1 - 1e-6) - 1e-9


def test_the_price_of_a_token_changes_at_the_knee() -> None:
    at_100_s, at_200_s, at_300_s = (FULL.step_s(num_prefill_tokens=n) for n in (100, 200, 300))

    assert at_200_s - at_100_s == pytest.approx(100 * 0.00004)
    assert at_300_s - at_200_s == pytest.approx(100 * 0.0001)


def test_without_further_fields_the_knee_is_where_arithmetic_takes_as_long_as_the_weights() -> None:
    assert MODEL.knee_tokens == pytest.approx(100)
    assert LatencyModel(per_token_s=0.0).knee_tokens == math.inf
    assert FULL.knee_tokens == 200


def test_attention_counts_every_token_before_and_itself() -> None:
    assert prefill_attention(3) == 1 + 2 + 3
    assert prefill_attention(2, 10) == 11 + 12


def test_a_cached_prefix_is_attended_to_but_not_computed() -> None:
    cold_s = FULL.prefill_s(1000)
    warm_s = FULL.prefill_s(100, num_cached_tokens=900)

    assert warm_s < cold_s
    assert warm_s > FULL.prefill_s(100)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"weights_s": -1.0}, "latency.weights_s: expected a number from 0, got -1.0"),
        ({"per_token_s": math.nan}, "latency.per_token_s: expected a number from 0, got nan"),
        ({"per_token_s": math.inf}, "latency.per_token_s: expected a number from 0, got inf"),
        ({"overhead_s": 0.0, "weights_s": 0.0}, "a step takes time"),
        ({"num_knee_tokens": -1.0}, "latency.num_knee_tokens: expected a number from 0"),
        ({"weights_s": None}, "latency.weights_s: expected a number from 0, got None"),
        (
            {"per_token_below_knee_s": 0.5},
            "per_token_below_knee_s: expected at most per_token_s = 0.0001, got 0.5",
        ),
        ({"max_num_batched_tokens": 0}, "max_num_batched_tokens: expected at least 1"),
    ],
)
def test_a_model_that_makes_no_sense_cannot_be_built(values: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LatencyModel(**values)


seconds = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=8)


@given(each_s=seconds)
def test_what_instances_of_unlike_speed_take_lies_between_the_fastest_and_the_mean(
    each_s: list[float],
) -> None:
    found = shared_out(each_s)

    assert min(each_s) <= found * (1 + 1e-9)
    assert found <= sum(each_s) / len(each_s) * (1 + 1e-9)


@given(each_s=seconds, load=st.floats(0.1, 100.0))
def test_instances_kept_equally_busy_take_as_long_as_what_they_share_out(
    each_s: list[float], load: float
) -> None:
    rates = [load / s for s in each_s]  # calls per second of each, all as busy as the others
    busy = sum(rate * s for rate, s in zip(rates, each_s, strict=True))

    assert shared_out(each_s) == pytest.approx(busy / sum(rates))


def test_an_instance_that_takes_no_time_gets_every_call() -> None:
    assert shared_out([0.0, 5.0]) == 0.0
