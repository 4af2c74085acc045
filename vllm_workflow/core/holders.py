"""Which instance of a large fleet got each piece of a prompt last."""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from vllm_workflow.core.prefix import Chain, Segment

_MAX_PIECES: Final = 1 << 16
"""Prompts come from clients."""


class Holders:
    """Remembers the latest pieces."""

    __slots__ = ("_last",)

    def __init__(self) -> None:
        self._last: OrderedDict[int, str] = OrderedDict()
        """By chain hash."""

    def note(self, prefix: Chain, instance_id: str) -> None:
        """Note where a prompt goes."""
        for segment in prefix:
            self._last[segment.chain_hash] = instance_id
            self._last.move_to_end(segment.chain_hash)
        while len(self._last) > _MAX_PIECES:
            self._last.popitem(last=False)

    def last(self, segment: Segment) -> str:
        """Return where a piece went last; empty if nobody knows."""
        return self._last.get(segment.chain_hash, "")
