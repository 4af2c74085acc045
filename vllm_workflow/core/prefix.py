"""What one instance's KV cache probably holds: calls in flight, and prefixes left by earlier ones.

A prompt is known by a chain of segments, each with a hash that covers it and everything before
it, so two prompts share exactly the segments whose hashes are equal. Where segments end is the
caller's affair (fixed pieces of text in a router, the parts of a trace in a simulation).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable
from typing import Final, final

from vllm_workflow.core.value import Value

_INF: Final = math.inf

_SEGMENT_FIELDS = (
    "chain_hash",
    "num_tokens",
)


@final
class Segment(Value):
    """One piece of a prompt's head."""

    __slots__ = _SEGMENT_FIELDS
    _fields = _SEGMENT_FIELDS

    chain_hash: Final[int]
    """Of this piece and all before it."""
    num_tokens: Final[int]

    def __init__(
        self,
        chain_hash: int,
        num_tokens: int,
    ) -> None:
        self.chain_hash = chain_hash
        self.num_tokens = num_tokens


MAX_IDLE_SEGMENTS: Final = 1 << 16
"""Of one instance: prompts come from clients, and pieces may be small."""
MAX_IDLE_SEGMENTS_UNBOUNDED: Final = 1 << 13
"""Of one whose capacity is not known: four million tokens in the pieces of the router."""

Chain = tuple[Segment, ...]
"""The head of a prompt that others may share, outermost piece first."""


@final
class _Held:
    __slots__ = ("num_tokens", "num_users")

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens
        self.num_users = 0
        """Calls in flight that read it, at least one."""


@final
class _Call:
    __slots__ = ("chain", "num_own_tokens")

    def __init__(self, chain: Chain, num_own_tokens: float) -> None:
        self.chain = chain
        self.num_own_tokens = num_own_tokens


@final
class KvLedger:
    """Tokens in one KV cache: shared segments once, whatever the number of calls that read them.

    Eviction is by least recent use, among segments that no call in flight reads, as in vLLM.

    Args:
        num_tokens: Capacity; `inf` where it is not known.
    """

    __slots__ = (
        "_calls",
        "_held",
        "_idle",
        "_num_idle_tokens",
        "num_other_tokens",
        "num_tokens",
        "num_used_tokens",
    )

    def __init__(self, num_tokens: float) -> None:
        self.num_tokens = num_tokens
        self.num_used_tokens = 0.0
        """Of the calls in flight; more than the capacity if more were sent than fit."""
        self.num_other_tokens = 0.0
        """That somebody else's calls hold, as far as the instance tells."""
        self._held: dict[int, _Held] = {}
        """What calls in flight read."""
        self._idle: OrderedDict[int, int] = OrderedDict()
        """Tokens of what none reads and may be evicted, the least recently used first. They are
        most of what is kept, so there is no object for each."""
        self._num_idle_tokens = 0.0
        self._calls: dict[str, _Call] = {}

    @property
    def num_free_tokens(self) -> float:
        """Room for further calls; unused prefixes give way. Negative if over-committed."""
        return self.num_tokens - self.num_used_tokens - self.num_other_tokens

    def num_cached_tokens(self, chain: Chain) -> int:
        """Tokens of a prompt's head that need no prefill."""
        return self.probe(chain, 0.0)[0]

    def probe(self, chain: Chain, num_own_tokens: float) -> tuple[int, float]:
        """Return `num_cached_tokens` and `num_new_tokens`."""
        held, idle = self._held, self._idle
        num_cached, is_cached = 0, True
        for segment in chain:
            known = held.get(segment.chain_hash)
            if known is not None:
                if is_cached:
                    num_cached += known.num_tokens
                continue
            num_own_tokens += segment.num_tokens
            if is_cached:
                num_idle_tokens = idle.get(segment.chain_hash)
                if num_idle_tokens is None:
                    is_cached = False
                else:
                    num_cached += num_idle_tokens
        return num_cached, num_own_tokens

    def num_new_tokens(self, chain: Chain, num_own_tokens: float) -> float:
        """Room that a call would take from others: what calls in flight do not hold for it."""
        held = self._held
        for segment in chain:
            if segment.chain_hash not in held:
                num_own_tokens += segment.num_tokens
        return num_own_tokens

    def admit(self, request_id: str, chain: Chain, num_own_tokens: float) -> float:
        """Count a call until `release`.

        Args:
            request_id: Not admitted already.
            chain: Head of its prompt.
            num_own_tokens: The rest of the prompt, and the output that is expected.

        Returns:
            `num_new_tokens`, as it was before.
        """
        held, num_new_tokens = self._held, num_own_tokens
        for segment in chain:
            known = held.get(segment.chain_hash)
            if known is None:
                num_new_tokens += segment.num_tokens
                num_tokens = self._idle.pop(segment.chain_hash, None)
                if num_tokens is None:
                    num_tokens = segment.num_tokens
                else:
                    self._num_idle_tokens -= num_tokens
                known = held[segment.chain_hash] = _Held(num_tokens)
                self.num_used_tokens += num_tokens
            known.num_users += 1
        self.num_used_tokens += num_own_tokens
        self._calls[request_id] = _Call(chain, num_own_tokens)
        if self._idle:
            self._evict()
        return num_new_tokens

    def release(self, request_id: str, *, keep: bool = True) -> None:
        """Stop counting a call; unknown ones are ignored.

        Args:
            request_id: As admitted.
            keep: Its prefix was computed and stays in the cache until it is evicted.
        """
        call = self._calls.pop(request_id, None)
        if call is None:
            return
        self.num_used_tokens -= call.num_own_tokens
        for segment in reversed(call.chain):  # the end of a prompt is the first to go, as in vLLM
            known = self._held[segment.chain_hash]
            known.num_users -= 1
            if known.num_users:
                continue
            del self._held[segment.chain_hash]
            self.num_used_tokens -= known.num_tokens
            if keep:
                self._idle[segment.chain_hash] = known.num_tokens
                self._num_idle_tokens += known.num_tokens
        if not self._calls:
            self.num_used_tokens = 0.0  # no rounding error outlives the calls
        self._evict()

    def resize(self, num_tokens: float) -> None:
        """Set the capacity."""
        self.num_tokens = num_tokens
        self._evict()

    def clear(self) -> None:
        """Forget every prefix that no call in flight reads: the engine has restarted."""
        self._idle.clear()
        self._num_idle_tokens = 0.0

    def forget(self, chain_hashes: Iterable[int]) -> int:
        """Hold some pieces no more, but those that a call in flight reads, which it computes.

        Returns:
            How many of them were held.
        """
        num_before = len(self._idle)
        for chain_hash in chain_hashes:
            self._num_idle_tokens -= self._idle.pop(chain_hash, 0)
        return num_before - len(self._idle)

    def __len__(self) -> int:
        return len(self._held) + len(self._idle)

    def _evict(self) -> None:
        idle, room = self._idle, self.num_tokens - self.num_used_tokens
        most = MAX_IDLE_SEGMENTS if room < _INF else MAX_IDLE_SEGMENTS_UNBOUNDED
        while idle and (self._num_idle_tokens > room or len(idle) > most):
            self._num_idle_tokens -= idle.popitem(last=False)[1]
