"""What a step is taken to be, seen with vLLM's own scheduler."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.emulation.emulated_engine import EOS, TOKEN, EmulatedEngine
from tests.engine.engine_builders import write_config
from vllm_workflow.core.latency import LatencyModel, prefill_attention
from vllm_workflow.emulation.requests import (
    NUM_OUTPUT_TOKENS_KEY,
    Step,
    hidden_num_output_tokens,
)

Make = Callable[..., EmulatedEngine]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("model"))


@pytest.fixture(params=["async", "sync", "async, second runner"])
def make_engine(request: pytest.FixtureRequest, model_dir: Path) -> Make:
    return lambda **kwargs: EmulatedEngine(
        model_dir,
        asynchronous=request.param != "sync",
        second_runner="second" in request.param,
        **kwargs,
    )


def counts(step: Step | None) -> tuple[int, int, int, float]:
    assert step is not None
    return (
        step.num_prefill_tokens,
        step.num_decode_seqs,
        step.num_kv_tokens,
        step.prefill_attention,
    )


def test_a_prompt_is_computed_in_chunks_beside_the_decodes_of_others(make_engine: Make) -> None:
    engine = make_engine(max_num_batched_tokens=32)
    engine.add("first", 10)
    first = counts(engine.step())
    engine.add("second", 50)

    steps = [counts(engine.step()) for _ in range(3)]

    assert first == (10, 0, 0, prefill_attention(10))
    # The token that is computed is part of the context that it attends to.
    assert steps == [
        (31, 1, 11, prefill_attention(31)),
        (19, 1, 12, prefill_attention(19, 31)),
        (0, 2, 13 + 51, 0.0),
    ]


def test_a_step_takes_what_the_latency_model_says_of_its_counts(make_engine: Make) -> None:
    latency = LatencyModel(
        per_token_below_knee_s=5e-5,
        per_seq_s=1e-5,
        per_kv_token_s=1e-7,
        per_prefill_kv_token_s=1e-9,
    )
    engine = make_engine(max_num_batched_tokens=32)
    engine.add("first", 10)
    engine.step()
    engine.add("second", 50)

    step = engine.step()

    assert step is not None
    assert step.duration_s(latency) == latency.step_s(
        num_prefill_tokens=31,
        num_decode_seqs=1,
        num_kv_tokens=11,
        prefill_attention=prefill_attention(31),
    )


def test_a_step_continues_when_requests_of_it_ran_before(make_engine: Make) -> None:
    engine = make_engine()
    engine.add("only", 10)

    first, second = engine.step(), engine.step()

    assert first is not None
    assert second is not None
    assert (first.continues, second.continues) == (False, True)


def test_an_answer_has_as_many_tokens_as_its_request_allows(make_engine: Make) -> None:
    engine = make_engine()
    engine.add("short", 10, max_tokens=1)
    engine.add("long", 10, max_tokens=9)

    engine.run()

    assert engine.answers == {"short": [TOKEN], "long": [TOKEN] * 9}


def test_an_answer_ends_at_the_hidden_length_with_the_end_token(make_engine: Make) -> None:
    engine = make_engine(num_seats=4)
    for length in (1, 2, 5, 100):
        engine.add(str(length), 10, max_tokens=20, **{NUM_OUTPUT_TOKENS_KEY: length})

    engine.run()

    assert engine.answers == {
        "1": [EOS],
        "2": [TOKEN, EOS],
        "5": [TOKEN] * 4 + [EOS],
        "100": [TOKEN] * 20,
    }


def test_no_end_token_before_min_tokens_and_none_under_ignore_eos(make_engine: Make) -> None:
    engine = make_engine(num_seats=4)
    hidden = {NUM_OUTPUT_TOKENS_KEY: 3}
    engine.add("min", 10, max_tokens=20, min_tokens=6, **hidden)
    engine.add("ignore", 10, max_tokens=8, ignore_eos=True, stop_token_ids=[9], **hidden)

    engine.run()

    assert engine.answers == {"min": [TOKEN] * 6 + [EOS], "ignore": [TOKEN] * 8}


@pytest.mark.parametrize("chunk", [24, 8192])
def test_preempted_requests_are_computed_anew_and_lose_no_token(
    make_engine: Make, chunk: int
) -> None:
    engine = make_engine(num_seats=3, num_blocks=14, max_num_batched_tokens=chunk)
    requests = [
        engine.add(name, 40, max_tokens=100, **{NUM_OUTPUT_TOKENS_KEY: length})
        for name, length in (("a", 70), ("b", 71), ("c", 72))
    ]

    steps = engine.run()

    assert sum(request.num_preemptions for request in requests) > 0
    assert {name: len(answer) for name, answer in engine.answers.items()} == {
        "a": 70,
        "b": 71,
        "c": 72,
    }
    assert all(answer[-1] == EOS and answer.count(EOS) == 1 for answer in engine.answers.values())
    # What was computed beyond the three prompts is the price of the preemptions.
    assert sum(step.num_prefill_tokens for step in steps) > 3 * 40


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(
        st.tuples(st.integers(1, 90), st.integers(1, 60), st.integers(1, 60)),
        min_size=1,
        max_size=8,
    ),
    num_seats=st.integers(1, 5),
    asynchronous=st.booleans(),
    second_runner=st.booleans(),
)
def test_whatever_runs_together_every_answer_has_its_exact_length(
    model_dir: Path,
    lengths: list[tuple[int, int, int]],
    num_seats: int,
    asynchronous: bool,
    second_runner: bool,
) -> None:
    engine = EmulatedEngine(
        model_dir,
        asynchronous=asynchronous,
        second_runner=second_runner,
        num_seats=num_seats,
        num_blocks=16,
        max_num_batched_tokens=64,
    )
    for i, (num_prompt, max_tokens, hidden) in enumerate(lengths):
        engine.add(str(i), num_prompt, max_tokens=max_tokens, **{NUM_OUTPUT_TOKENS_KEY: hidden})

    engine.run()

    wanted = [min(max_tokens, hidden) for _, max_tokens, hidden in lengths]
    assert [len(engine.answers[str(i)]) for i in range(len(lengths))] == wanted
    assert len(engine.worker) == 0


JUNK: list[Any] = [0, -1, "5", "", math.nan, math.inf, -math.inf, 1e308, 2**63, True, [3], None]


@pytest.mark.parametrize("value", JUNK)
def test_a_hidden_length_without_sense_is_no_hidden_length(make_engine: Make, value: Any) -> None:
    engine = make_engine()
    engine.add("junk", 10, max_tokens=5, **{NUM_OUTPUT_TOKENS_KEY: value})

    engine.run()

    assert engine.answers == {"junk": [TOKEN] * 5}


@given(st.dictionaries(st.text(), st.integers()) | st.lists(st.integers()) | st.none())
def test_a_hidden_length_that_is_not_there_is_none(extra_args: Any) -> None:
    assert hidden_num_output_tokens(extra_args) is None


def test_a_whole_number_may_come_as_a_float() -> None:
    assert hidden_num_output_tokens({NUM_OUTPUT_TOKENS_KEY: 3.0}) == 3
    assert hidden_num_output_tokens({NUM_OUTPUT_TOKENS_KEY: 3.5}) is None
