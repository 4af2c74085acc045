"""The head of a prompt as hashes, so that the ledger knows which instance has seen it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

_PIECE_BYTES = 2048
"""About 500 tokens: a share of a prompt that is worth knowing of."""
_MAX_PIECES = 256
_dumps = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def head_of(members: Mapping[str, Any]) -> tuple[tuple[int, int], ...]:
    """Return `(chain hash, bytes)` of each piece of a body's prompt, from its beginning.

    Equal prompts up to the end of a piece have equal hashes up to it. What comes after the
    last whole piece is left out: another prompt hardly ends there too.
    """
    prompt = members.get("messages") or members.get("prompt") or members.get("input")
    if not prompt:
        return ()
    text = (prompt if isinstance(prompt, str) else _dumps(prompt)).encode(errors="replace")
    chain = b""
    pieces: list[tuple[int, int]] = []
    for start in range(0, min(len(text), _PIECE_BYTES * _MAX_PIECES), _PIECE_BYTES):
        piece = text[start : start + _PIECE_BYTES]
        if len(piece) < _PIECE_BYTES:
            break
        chain = blake2b(piece, digest_size=8, key=chain).digest()
        pieces.append((int.from_bytes(chain), _PIECE_BYTES))
    return tuple(pieces)
