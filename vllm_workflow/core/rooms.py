"""Which instances have room, and for how much: found without looking at all of a large fleet."""

from __future__ import annotations

import math
from typing import Final

from vllm_workflow.core.account import Account

_IDLE: Final = 1 << 10
"""Size of an instance that takes any call."""


class Rooms:
    """The instances that can start a further call, by the power of two of their free KV tokens."""

    __slots__ = ("_by_size", "_size_of", "_sizes")

    def __init__(self) -> None:
        self._by_size: dict[int, dict[str, Account]] = {}
        self._sizes: list[int] = []
        """The largest first."""
        self._size_of: dict[str, int] = {}

    def note(self, account: Account) -> None:
        """Take notice of what an instance can start from now on."""
        instance_id = account.instance.instance_id
        size = -1
        if account.has_room:
            size = _size(account.kv.num_free_tokens) if not account.is_idle else _IDLE
        before = self._size_of.get(instance_id, -1)
        if size == before:
            return
        if before >= 0:
            accounts = self._by_size[before]
            del accounts[instance_id]
            if not accounts:
                del self._by_size[before]
                self._sizes.remove(before)
        if size >= 0:
            self._size_of[instance_id] = size
            if size not in self._by_size:
                self._by_size[size] = {}
                self._sizes.append(size)
                self._sizes.sort(reverse=True)
            self._by_size[size][instance_id] = account
        else:
            del self._size_of[instance_id]

    def at_least(self, num_tokens: float) -> list[dict[str, Account]]:
        """Return the instances that may have so many free tokens: groups, the roomiest first."""
        least = _size(num_tokens)
        return [self._by_size[size] for size in self._sizes if size >= least]

    def __len__(self) -> int:
        return len(self._size_of)


def _size(num_tokens: float) -> int:
    return _IDLE - 1 if num_tokens == math.inf else int(max(0.0, num_tokens)).bit_length()
