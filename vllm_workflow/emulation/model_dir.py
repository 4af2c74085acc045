"""A folder that `vllm serve --emulate-gpu` takes for a model: configuration and tokenizer only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vllm_workflow.core.errors import ConfigError
from vllm_workflow.core.hardware import ModelShape

END_TOKEN = "<|end|>"
END_TOKEN_ID = 256
MAX_MODEL_LEN = 131_072
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def write_model_dir(shape: ModelShape, path: Path, *, max_model_len: int = MAX_MODEL_LEN) -> None:
    """Write `config.json` and a tokenizer with one token per byte.

    Token ids 0 to 255 are the bytes, 256 ends an answer. The ids above are in the vocabulary of
    the model, so prompts may be given as any of them, but they are no text.

    Args:
        shape: Of the model; also the size of its vocabulary.
        path: The folder; made if it is not there.
        max_model_len: Longest context that the configuration allows.

    Raises:
        ConfigError: A vocabulary too small for bytes, or a folder with other things in it.
    """
    if shape.vocab_size <= END_TOKEN_ID:
        raise ConfigError(
            f"model shape {shape.name}: expected a vocab_size above {END_TOKEN_ID}, "
            f"got {shape.vocab_size}"
        )
    files = {
        "config.json": _config(shape, max_model_len),
        "generation_config.json": {"eos_token_id": END_TOKEN_ID},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": END_TOKEN,
            "pad_token": END_TOKEN,
            "clean_up_tokenization_spaces": False,
            "model_max_length": max_model_len,
            "chat_template": CHAT_TEMPLATE,
        },
    }
    if path.exists():
        others = sorted({p.name for p in path.iterdir()} - {*files, "tokenizer.json"})
        if others:
            raise ConfigError(
                f"{path}: expected an empty folder, or one that this command wrote; got {others[0]}"
            )
    path.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (path / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    _byte_tokenizer().save(str(path / "tokenizer.json"))


def _config(shape: ModelShape, max_model_len: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab_size,
        "tie_word_embeddings": shape.tied_embeddings,
        "max_position_embeddings": max_model_len,
        "bos_token_id": None,
        "eos_token_id": END_TOKEN_ID,
        "torch_dtype": "bfloat16",
    }


def _byte_tokenizer() -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    letters = {letter: byte for byte, letter in enumerate(_byte_letters())}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END_TOKEN, special=True, normalized=False)])
    return tokenizer


def _byte_letters() -> list[str]:
    """The letter that byte-level tokenizers write for each byte: printable ones are themselves."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    stand_ins = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(stand_ins)) for byte in range(256)]
