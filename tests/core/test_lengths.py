from hypothesis import given
from hypothesis import strategies as st

from vllm_workflow.core.lengths import PRIOR_OUTPUT_TOKENS, Lengths


def observed(lengths: Lengths, stage: str, *output_tokens: int) -> float:
    for count in output_tokens:
        lengths.observe("w", stage, output_tokens=count, tokens_per_byte=None)
    return lengths.output_tokens("w", stage)


def test_a_stage_never_seen_has_the_prior_length() -> None:
    assert Lengths().output_tokens("w", "s") == PRIOR_OUTPUT_TOKENS


def test_the_first_answer_of_an_undeclared_stage_replaces_the_prior() -> None:
    assert observed(Lengths(), "s", 500) == 500.0


def test_a_declared_length_yields_to_what_is_seen() -> None:
    lengths = Lengths()
    lengths.declare("w", "s", 100.0)

    after_one = observed(lengths, "s", 200)
    after_many = observed(lengths, "s", *[200] * 100)

    assert 100.0 < after_one < 150.0
    assert 190.0 < after_many < 200.0


def test_a_changed_prompt_is_noticed_however_long_the_old_one_ran() -> None:
    lengths = Lengths()
    observed(lengths, "s", *[100] * 2000)

    assert observed(lengths, "s", *[1000] * 600) > 900.0


def test_the_client_s_own_limit_bounds_the_prediction() -> None:
    lengths = Lengths()
    observed(lengths, "s", 500)

    assert lengths.output_tokens("w", "s", max_tokens=20) == 20.0
    assert lengths.output_tokens("w", "s", max_tokens=9000) == 500.0


def test_names_that_clients_invent_do_not_fill_the_memory() -> None:
    lengths = Lengths()
    observed(lengths, "kept", 500)
    for i in range(10_000):
        observed(lengths, f"s{i}", 7)
        if i % 1000 == 0:
            observed(lengths, "kept", 500)

    assert len(lengths._output) <= 4096
    assert lengths.output_tokens("w", "kept") == 500.0
    assert lengths.output_tokens("w", "s0") == PRIOR_OUTPUT_TOKENS


@given(st.lists(st.tuples(st.integers(0, 10**6), st.floats(0.0, 1.0)), max_size=50))
def test_predictions_are_at_least_one_token(seen: list[tuple[int, float]]) -> None:
    lengths = Lengths()
    for output_tokens, tokens_per_byte in seen:
        lengths.observe("w", "s", output_tokens=output_tokens, tokens_per_byte=tokens_per_byte)

    assert lengths.output_tokens("w", "s") >= 1.0
    assert lengths.prompt_tokens(0) == 1
    assert lengths.prompt_tokens(1000) >= 1


def test_tokens_per_byte_follow_the_tokenizer() -> None:
    lengths = Lengths()
    for _ in range(300):
        lengths.observe("w", "s", output_tokens=None, tokens_per_byte=0.5)

    assert 490 <= lengths.prompt_tokens(1000) <= 500
