"""Which tokens an emulated GPU emits: one that is plain text, and what a grammar asks for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm_workflow.core.errors import ConfigError

_TEXTS = (" a", "a", " the", "x", "0")
_CLOSING = ('"', "}", "]", ",", ":", "[", "{", "0")
"""In this order, each as soon as a grammar allows it, they end a JSON document."""
_LITERALS = ("t", "n")
"""First letters of what else a JSON value may be; else a grammar that allows blanks before it
would get nothing but blanks."""


class TokenChoice:
    """The tokens of one tokenizer that matter here."""

    def __init__(self, tokenizer: Any) -> None:
        """Look them up.

        Args:
            tokenizer: As vLLM loads it.

        Raises:
            ConfigError: No token of it is a letter.
        """
        found = (_single(tokenizer, text) for text in _TEXTS)
        plain = next((token_id for token_id in found if token_id is not None), None)
        if plain is None:
            raise ConfigError(
                f"--emulate-gpu: tokenizer of MODEL: expected a token for one of {_TEXTS}, got none"
            )
        self.plain_id: int = plain
        """Decodes to text without meaning."""
        closing, literals = (
            [t for text in texts if (t := _single(tokenizer, text)) is not None]
            for texts in (_CLOSING, _LITERALS)
        )
        self._preferred_ids = [*closing, plain, *literals]

    def allowed(self, row: Sequence[int], *, end_token_id: int | None, is_over: bool) -> int:
        """The token for a request with structured output.

        Args:
            row: Bits of the tokens that its grammar allows, 32 per element.
            end_token_id: Ends its answer.
            is_over: Its answer is as long as wanted, or nobody said how long.
        """
        if not is_over and _is_allowed(row, self.plain_id):
            return self.plain_id
        if end_token_id is not None and _is_allowed(row, end_token_id):
            return end_token_id
        for token_id in self._preferred_ids:
            if _is_allowed(row, token_id):
                return token_id
        for index, word in enumerate(row):
            bits = int(word)
            if bits:
                return index * 32 + (bits & -bits).bit_length() - 1
        return self.plain_id  # a grammar without a way on; vLLM ends the request


def _is_allowed(row: Sequence[int], token_id: int) -> bool:
    index, bit = divmod(token_id, 32)
    return index < len(row) and bool(int(row[index]) >> bit & 1)


def _single(tokenizer: Any, text: str) -> int | None:
    """The token that a text is; None if it is several, or does not come back as it went in."""
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    if len(token_ids) != 1 or tokenizer.decode(token_ids).strip() != text.strip():
        return None
    return int(token_ids[0])
