"""Text of an exact number of tokens, about as long per token as real text.

Some routers look into prompts as text only, and refuse token ids. So at level 3 prompts are words
of `NUM_LETTERS` letters, and the emulated model's tokenizer has one token for each.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from string import ascii_lowercase
from typing import Any

from vllm_workflow.core.hardware import ModelShape
from vllm_workflow.emulation.model_dir import END_TOKEN, END_TOKEN_ID, write_model_dir

NUM_LETTERS = 4
"""Bytes per token, as of English under usual tokenizers."""
WORDS = tuple(
    "".join(letters) + " "
    for letters in itertools.islice(
        itertools.product(ascii_lowercase, repeat=NUM_LETTERS - 1), 4096
    )
)
_ANSWER = " a"
"""What an emulated GPU emits."""
_UNKNOWN = "<|unknown|>"


def write_word_model(shape: ModelShape, path: Path) -> None:
    """Write the folder of `write_model_dir` with a tokenizer of `WORDS`.

    Raises:
        ConfigError: See `write_model_dir`.
    """
    write_model_dir(shape, path)
    word_tokenizer().save(str(path / "tokenizer.json"))


def word_tokenizer() -> Any:
    """Return a tokenizer that takes each of `WORDS` for one token, however they follow."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    words = [_ANSWER, *WORDS]
    words.insert(END_TOKEN_ID, END_TOKEN)
    words.append(_UNKNOWN)
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token=_UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(f".{{{NUM_LETTERS}}}"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(END_TOKEN, special=True, normalized=False)])
    return tokenizer
