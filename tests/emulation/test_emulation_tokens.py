"""Which tokens are emitted, with the tokenizer of `vllm-workflow emulated-model`."""

import json
from pathlib import Path
from typing import Any

import pytest

from vllm_workflow.cli.main import main
from vllm_workflow.core.errors import ConfigError
from vllm_workflow.core.hardware import ModelShape
from vllm_workflow.emulation.model_dir import END_TOKEN_ID, write_model_dir
from vllm_workflow.emulation.tokens import TokenChoice
from vllm_workflow.profiles import catalogue


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("emulated") / "model"
    assert main(["emulated-model", "llama-3.2-1b", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def tokenizer(model_dir: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(model_dir))


@pytest.fixture(scope="module")
def tokens(tokenizer: Any) -> TokenChoice:
    return TokenChoice(tokenizer)


def row(*allowed: str | int, num_words: int = 4008) -> list[int]:
    """Bits as a grammar gives them: signed 32-bit words."""
    words = [0] * num_words
    for each in allowed:
        token_id = each if isinstance(each, int) else ord(each)
        words[token_id // 32] |= 1 << token_id % 32
    return [word - 2**32 if word >= 2**31 else word for word in words]


def test_each_byte_is_a_token_and_text_survives(tokenizer: Any) -> None:
    text = "SELECT 'ä€'\n\t\x00;"

    assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text
    assert tokenizer.eos_token_id == END_TOKEN_ID


def test_a_token_above_the_bytes_is_no_text(tokenizer: Any) -> None:
    assert tokenizer.decode([ord("a"), 100_000, ord("b")]) == "ab"


def test_the_configuration_is_that_of_the_shape(model_dir: Path) -> None:
    config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    shape = catalogue.shape("llama-3.2-1b")

    assert config["num_hidden_layers"] == shape.num_layers
    assert config["num_key_value_heads"] == shape.num_kv_heads
    assert config["vocab_size"] == shape.vocab_size
    assert not list(model_dir.glob("*.safetensors"))


def test_a_chat_becomes_one_prompt(tokenizer: Any) -> None:
    chat = [{"role": "user", "content": "hi"}]

    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)

    assert text == "user: hi\nassistant: "


def test_writing_again_is_fine_but_not_over_something_else(model_dir: Path, tmp_path: Path) -> None:
    shape = catalogue.shape("llama-3.1-8b")
    write_model_dir(shape, model_dir.parent / "again")
    write_model_dir(shape, model_dir.parent / "again")
    (tmp_path / "thesis.tex").touch()

    with pytest.raises(ConfigError, match=r"expected an empty folder.*got thesis\.tex"):
        write_model_dir(shape, tmp_path)


def test_a_vocabulary_smaller_than_the_bytes_is_refused(tmp_path: Path) -> None:
    numbers = dict.fromkeys(
        ("num_layers", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim"),
        1,
    )
    with pytest.raises(ConfigError, match="expected a vocab_size above 256, got 256"):
        write_model_dir(ModelShape(name="tiny", vocab_size=256, **numbers), tmp_path)


def test_without_a_grammar_answers_are_plain_text(tokens: TokenChoice, tokenizer: Any) -> None:
    assert tokenizer.decode([tokens.plain_id]) == "a"


def test_an_answer_with_a_grammar_ends_as_soon_as_it_may(tokens: TokenChoice) -> None:
    def choose(*allowed: str | int) -> int:
        return tokens.allowed(row(*allowed), end_token_id=END_TOKEN_ID, is_over=True)

    assert choose(END_TOKEN_ID, "}", "a") == END_TOKEN_ID
    assert choose(" ", "a", '"') == ord('"')
    assert choose(" ", "\n", "[") == ord("[")
    assert choose("\t", " ", "t", "f") == ord("t")
    assert choose("q", "z") == ord("q")
    assert choose(127_999) == 127_999


def test_an_answer_with_a_grammar_is_filled_up_to_its_hidden_length(tokens: TokenChoice) -> None:
    within = tokens.allowed(row(END_TOKEN_ID, '"', "a"), end_token_id=END_TOKEN_ID, is_over=False)
    beyond = tokens.allowed(row(END_TOKEN_ID, '"', "a"), end_token_id=END_TOKEN_ID, is_over=True)

    assert (within, beyond) == (tokens.plain_id, END_TOKEN_ID)


def test_a_request_that_no_token_ends_gets_none_that_would(tokens: TokenChoice) -> None:
    chosen = tokens.allowed(row(END_TOKEN_ID, "b"), end_token_id=None, is_over=True)

    assert chosen == ord("b")


def test_a_tokenizer_without_letters_is_refused() -> None:
    class Digits:
        def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
            return [int(c) + 1 for c in text if c in "123456789"]

        def decode(self, token_ids: list[int]) -> str:
            return "".join(str(i - 1) for i in token_ids)

    with pytest.raises(ConfigError, match="expected a token for one of"):
        TokenChoice(Digits())
