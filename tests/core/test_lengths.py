import math

from hypothesis import given
from hypothesis import strategies as st

from vllm_workflow.core.lengths import (
    DECLARED,
    LEARNED,
    PRIOR,
    PRIOR_OUTPUT_TOKENS,
    Lengths,
    StageLengths,
)

PROMPT = 1000


def key(stage: str = "s", tenant: str = "t") -> tuple[str, str, str]:
    return tenant, "w", stage


def expected(lengths: Lengths, stage: str = "s", num_prompt_tokens: int = PROMPT) -> float:
    return lengths.output_tokens(key(stage), num_prompt_tokens)[0]


def observed(
    lengths: Lengths, stage: str, *output_tokens: int, num_prompt_tokens: int = PROMPT
) -> float:
    for count in output_tokens:
        lengths.observe(key(stage), num_prompt_tokens=num_prompt_tokens, output_tokens=count)
    return expected(lengths, stage, num_prompt_tokens)


def test_a_stage_never_seen_has_the_prior_length() -> None:
    assert Lengths().output_tokens(key(), PROMPT) == (PRIOR_OUTPUT_TOKENS, PRIOR)


def test_a_prediction_says_where_it_comes_from() -> None:
    lengths = Lengths()
    lengths.declare({("w", "s"): 100.0})
    before = lengths.output_tokens(key(), PROMPT)
    observed(lengths, "s", 100)

    assert before == (100.0, DECLARED)
    assert lengths.output_tokens(key(), PROMPT)[1] == LEARNED


def test_the_first_answer_of_an_undeclared_stage_replaces_the_prior() -> None:
    assert observed(Lengths(), "s", 500) == 500.0


def test_a_declared_length_yields_to_what_is_seen() -> None:
    lengths = Lengths()
    lengths.declare({("w", "s"): 100.0})

    after_one = observed(lengths, "s", 200)
    after_many = observed(lengths, "s", *[200] * 100)

    assert 100.0 < after_one < 150.0
    assert 190.0 < after_many < 200.0


def test_long_prompts_with_short_answers_do_not_shorten_those_of_short_prompts() -> None:
    lengths = Lengths()
    for _ in range(50):
        observed(lengths, "s", 2000, num_prompt_tokens=4000)
        observed(lengths, "s", 600, num_prompt_tokens=9000)

    assert expected(lengths, num_prompt_tokens=4100) > 1900.0
    assert expected(lengths, num_prompt_tokens=9100) < 700.0


def test_a_prompt_of_a_length_never_seen_has_the_answer_of_the_stage() -> None:
    lengths = Lengths()
    observed(lengths, "s", *[300] * 20)

    assert expected(lengths, num_prompt_tokens=50 * PROMPT) == 300.0


def test_a_length_seen_once_stays_near_the_mean_of_the_stage() -> None:
    lengths = Lengths()
    observed(lengths, "s", *[300] * 100)

    assert observed(lengths, "s", 3000, num_prompt_tokens=50 * PROMPT) < 1000.0


def test_what_one_tenant_does_tells_nothing_about_another() -> None:
    lengths = Lengths()
    observed(lengths, "s", *[5000] * 100)

    assert lengths.output_tokens(key(tenant="other"), PROMPT)[1] == PRIOR


def test_a_changed_prompt_is_noticed_however_long_the_old_one_ran() -> None:
    lengths = Lengths()
    observed(lengths, "s", *[100] * 2000)

    assert observed(lengths, "s", *[1000] * 600) > 900.0


def test_the_client_s_own_limit_bounds_the_prediction() -> None:
    lengths = Lengths()
    observed(lengths, "s", 500)

    assert lengths.output_tokens(key(), PROMPT, max_tokens=20)[0] == 20.0
    assert lengths.output_tokens(key(), PROMPT, max_tokens=9000)[0] == 500.0


def test_names_that_clients_invent_do_not_fill_the_memory() -> None:
    lengths = Lengths()
    observed(lengths, "kept", 500)
    for i in range(10_000):
        observed(lengths, f"s{i}", 7)
        if i % 1000 == 0:
            observed(lengths, "kept", 500)

    assert len(lengths._stages) <= 4096
    assert expected(lengths, "kept") == 500.0
    assert expected(lengths, "s0") == PRIOR_OUTPUT_TOKENS


def test_prompts_of_all_lengths_do_not_fill_the_memory() -> None:
    lengths = Lengths()
    for exponent in range(300):
        observed(lengths, "s", 7, num_prompt_tokens=max(1, int(1.07**exponent)))

    assert len(lengths._stages[key()].by_prompt) <= 2 * math.log2(1.07**300) + 1


def test_what_was_learned_is_written_down_and_read_back() -> None:
    lengths, other = Lengths(), Lengths()
    observed(lengths, "s", 100, 200, 300)
    observed(lengths, "s", 900, num_prompt_tokens=4)
    for each, stage in lengths.items():
        other.restore(each, StageLengths.from_mapping(stage.to_mapping()))

    for num_prompt_tokens in (4, PROMPT, 10**6):
        assert expected(other, "s", num_prompt_tokens) == expected(lengths, "s", num_prompt_tokens)


@given(
    st.lists(
        st.tuples(st.integers(0, 10**6), st.integers(0, 10**9), st.floats(0.0, 1.0)), max_size=50
    )
)
def test_predictions_are_at_least_one_token(seen: list[tuple[int, int, float]]) -> None:
    lengths = Lengths()
    for output_tokens, num_prompt_tokens, tokens_per_byte in seen:
        observed(lengths, "s", output_tokens, num_prompt_tokens=num_prompt_tokens)
        lengths.observe_prompt(tokens_per_byte)
        assert expected(lengths, "s", num_prompt_tokens) >= 1.0

    assert lengths.prompt_tokens(0) == 1
    assert lengths.prompt_tokens(1000) >= 1


def test_tokens_per_byte_follow_the_tokenizer() -> None:
    lengths = Lengths()
    for _ in range(300):
        lengths.observe_prompt(0.5)

    assert 490 <= lengths.prompt_tokens(1000) <= 500
