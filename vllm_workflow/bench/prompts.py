"""Prompts of token ids: of exact length, and shared exactly as far as a trace says.

The ids of a part follow from its id and length, those behind the last part from the names of
run and call: two prompts begin alike as far as their parts are equal, in every process and on
every machine. With another salt all are different, so that a load finds nothing in the caches of
a server that another load has left there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from vllm_workflow.core.errors import ConfigError
from vllm_workflow.sim.types import TraceCall

_NUM_CACHED_PARTS = 2048
_LEAST_VOCABULARY = 8
_NUM_SPECIAL = 4
"""Ids from 0 that tokenizers commonly give to begin, end, unknown and padding."""


class Prompts:
    """Makes the prompts of calls.

    Args:
        token_ids: Ids to draw from, each valid at the server.
        salt: Prompts of different salts share nothing.

    Raises:
        ConfigError: Too few to tell prompts apart.
    """

    def __init__(self, token_ids: Sequence[int], salt: str = "") -> None:
        if len(token_ids) < _LEAST_VOCABULARY:
            raise ConfigError(
                f"vocabulary: expected at least {_LEAST_VOCABULARY} token ids, got {len(token_ids)}"
            )
        self._salt = salt
        self._open, self._between, self._close = "[", ",", "]"
        self._words = np.array([str(i) for i in token_ids], dtype=object)
        self._part = lru_cache(_NUM_CACHED_PARTS)(self._drawn)
        self._drawn(("the first draw loads what the others need",), 1)

    @classmethod
    def of_vocabulary(cls, vocab_size: int, salt: str = "") -> Prompts:
        """Draw from all ids below `vocab_size`, but for the first few.

        Raises:
            ConfigError: See the class.
        """
        return cls(range(_NUM_SPECIAL, vocab_size), salt)

    @classmethod
    def of_words(cls, words: Sequence[str], salt: str = "") -> Prompts:
        """Draw texts in the place of ids.

        Args:
            words: One token each at the server, however they follow one another; nothing that
                JSON would escape.
            salt: See the class.

        Raises:
            ConfigError: See the class.
        """
        made = cls(range(len(words)), salt)
        made._words = np.array(words, dtype=object)
        made._open, made._between, made._close = '"', "", '"'
        return made

    def json_prompt(self, run_id: str, call: TraceCall) -> bytes:
        """Return the prompt of a call as JSON; arguments as of `json_ids`."""
        inside = self.json_ids(run_id, call)
        return self._open.encode() + inside + self._close.encode()

    def json_ids(self, run_id: str, call: TraceCall) -> bytes:
        """Return the prompt of a call as the inside of a JSON list, or of a JSON text.

        Args:
            run_id: Of the call's run, as prompts are to depend on it.
            call: Whose `num_prompt_tokens` the prompt has; parts beyond that are cut.
        """
        pieces: list[str] = []
        num_left = max(1, call.num_prompt_tokens)
        for part in call.prefix:
            if num_left <= 0:
                break
            words = self._part(("part", part.part_id, str(part.num_tokens)), part.num_tokens)
            pieces.extend(words[:num_left])
            num_left -= part.num_tokens
        if num_left > 0:
            pieces.extend(self._drawn(("call", run_id, call.call_id), num_left))
        return self._between.join(pieces).encode()

    def _drawn(self, names: tuple[str, ...], num_tokens: int) -> list[str]:
        digest = hashlib.sha256("\x1f".join((self._salt, *names)).encode()).digest()
        generator = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16])))
        drawn: list[str] = self._words[
            generator.integers(len(self._words), size=num_tokens)
        ].tolist()
        return drawn
