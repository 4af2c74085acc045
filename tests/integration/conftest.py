"""Real `vllm serve` processes for tests, with a tiny model of random weights."""

import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.integration.vllm_process import VllmServer, serving


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "vllm_server" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.vllm)
            item.add_marker(pytest.mark.slow)
            if not find_spec("vllm"):
                item.add_marker(pytest.mark.skip(reason="vLLM is not installed"))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 12 thin layers and one token per letter, for `--load-format dummy`."""
    path = tmp_path_factory.mktemp("tiny-llama")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers
        from transformers import LlamaConfig, PreTrainedTokenizerFast

        letters = {chr(i): i for i in range(128)}
        tokenizer = Tokenizer(models.WordLevel(letters, unk_token=" "))
        tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        tokenizer.decoder = decoders.Fuse()
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="\0", unk_token=" ")
        fast.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
        fast.save_pretrained(path)
        LlamaConfig(
            architectures=["LlamaForCausalLM"],
            hidden_size=64,
            intermediate_size=512,
            num_hidden_layers=12,
            num_attention_heads=1,
            num_key_value_heads=1,
            vocab_size=128,
            max_position_embeddings=8192,
            bos_token_id=1,
            eos_token_id=0,
            dtype="float32",
        ).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def vllm_server(
    request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[VllmServer]:
    """A server with the flags that the module names in `VLLM_FLAGS`, for all of its tests."""
    log_path = tmp_path_factory.mktemp("vllm") / "server.log"
    with serving(tiny_model, log_path, getattr(request.module, "VLLM_FLAGS", ())) as server:
        yield server
