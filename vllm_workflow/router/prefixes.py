"""The head of a prompt as hashes, so that the ledger knows which instance has seen it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import msgspec
from xxhash import xxh3_64_intdigest

_PIECE_BYTES = 2048
"""About 500 tokens: a share of a prompt that is worth knowing of."""
_MAX_BYTES = 256 * _PIECE_BYTES
_ITEMS_AT_ONCE = 16
"""Token ids, or messages that are not only text, that are written at a time: a prefix must begin
with the same bytes whatever follows it."""
_dumps = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def head_of(members: Mapping[str, Any]) -> tuple[tuple[int, int], ...]:
    """Return `(chain hash, bytes)` of each piece of a body's prompt, from its beginning.

    Equal prompts up to the end of a piece have equal hashes up to it. What comes after the
    last whole piece is left out: another prompt hardly ends there too.
    """
    prompt = members.get("messages") or members.get("prompt") or members.get("input")
    text = _text(prompt)
    chain = 0
    pieces: list[tuple[int, int]] = []
    for start in range(0, min(len(text), _MAX_BYTES), _PIECE_BYTES):
        piece = text[start : start + _PIECE_BYTES]
        if len(piece) < _PIECE_BYTES:
            break
        chain = xxh3_64_intdigest(piece, chain)
        pieces.append((chain, _PIECE_BYTES))
    return tuple(pieces)


def _text(prompt: Any) -> bytes:
    """As much of a prompt as is looked at, and not much more: it may be huge."""
    if isinstance(prompt, str):
        return prompt[:_MAX_BYTES].encode(errors="replace")
    if not isinstance(prompt, list):
        return b""
    parts: list[bytes] = []
    num_bytes = 0
    at, end = 0, len(prompt)
    while at < end and num_bytes < _MAX_BYTES:
        part = _spoken(prompt[at])
        if part is not None:
            at += 1
        else:
            part = _written(prompt[at : at + _ITEMS_AT_ONCE])
            at += _ITEMS_AT_ONCE
        parts.append(part)
        num_bytes += len(part)
    return b"".join(parts)


def _spoken(item: Any) -> bytes | None:
    """Return names and texts of a message that is nothing but text; None for others."""
    if type(item) is not dict:
        return None
    texts: list[str] = []
    for name, text in item.items():
        if type(text) is not str:
            return None
        texts.append(name)
        texts.append(text if len(text) <= _MAX_BYTES else text[:_MAX_BYTES])
    texts.append("")
    return "\0".join(texts).encode(errors="replace")


def _written(items: list[Any]) -> bytes:
    """Equal items as equal bytes."""
    try:
        return msgspec.json.encode(items)
    except (UnicodeError, OverflowError, RecursionError):  # as JSON has it and UTF-8 has not, say
        return _dumps(items).encode(errors="replace")
