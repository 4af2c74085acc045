"""Which pieces of prompts an engine still caches, by what it tells of its KV blocks.

An engine names its blocks by hashes of token ids, which a router does not know. What it does know
is whose block it is: a call is sent with its request id as vLLM's `session_id`, and each report of
blocks stored or used again carries that. When the call has ended, its prompt's tokens are known,
and so is the block that each piece of its prompt ends in. If that block is removed, the prompt is
cached up to before that piece at most.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from vllm_workflow.core.types import StageRequest

BlockHash = bytes | int

MAX_BLOCKS = 1 << 19
"""Of one engine; what tells of more is not believed. Forgetting twice as many took 73 ms."""
MAX_CALL_BLOCKS = 1 << 17
"""Of one call; of one that seems to have more nothing is learned."""
MAX_CALLS = 4096
"""Followed at a time, those that have ended and of which not all blocks were reported included."""


@dataclass(slots=True)
class _Call:
    request: StageRequest
    num_prompt_tokens: int
    has_ended: bool = False
    block_size: int = 0
    blocks: list[BlockHash] = field(default_factory=list)
    """Those of its prompt and answer, from the beginning, as far as they were reported."""


class Blocks:
    """The blocks of one engine. Methods return the pieces, by chain hash, that it has let go."""

    def __init__(self) -> None:
        self._held: set[BlockHash] = set()
        self._ends: dict[BlockHash, list[int]] = {}
        """Pieces that end in a block."""
        self._calls: OrderedDict[str, _Call] = OrderedDict()

    def __len__(self) -> int:
        """Blocks that a piece is known to end in."""
        return len(self._ends)

    def sent(self, request: StageRequest) -> None:
        """Note that the engine gets a call, with its id as `session_id`."""
        if not request.prefix:
            return
        self._calls.pop(request.request_id, None)
        self._calls[request.request_id] = _Call(request, request.num_prompt_tokens)
        if len(self._calls) > MAX_CALLS:
            self._calls.popitem(last=False)

    def ended(self, request_id: str, num_prompt_tokens: int | None) -> list[int]:
        """Note that a call has ended.

        Args:
            request_id: Of the call.
            num_prompt_tokens: As the engine counted; None if it did not say.
        """
        call = self._calls.get(request_id)
        if call is None:
            return []
        if not call.blocks and num_prompt_tokens is None:
            del self._calls[request_id]  # it never ran, or nothing is told of it
            return []
        call.has_ended = True
        call.num_prompt_tokens = num_prompt_tokens or call.num_prompt_tokens
        return self._placed(call)

    def stored(
        self,
        session_id: str | None,
        hashes: Sequence[BlockHash],
        *,
        parent: BlockHash | None,
        block_size: int,
    ) -> list[int]:
        """Note blocks that the engine has stored, or found in its cache, for a call.

        Args:
            session_id: The call's, if it was sent here.
            hashes: Of blocks that follow each other.
            parent: The block before them; None if the first of them begins a prompt.
            block_size: Tokens of each.
        """
        self._held.update(hashes)
        if len(self._held) > MAX_BLOCKS:
            self.lost()
            return []
        call = self._calls.get(session_id) if session_id else None
        if call is None:
            return []
        at = 0
        if parent is not None:
            try:
                at = len(call.blocks) - call.blocks[::-1].index(parent)
            except ValueError:  # what came before was not reported
                del self._calls[call.request.request_id]
                return []
        if at + len(hashes) > MAX_CALL_BLOCKS:
            del self._calls[call.request.request_id]
            return []
        call.blocks[at : at + len(hashes)] = hashes
        call.block_size = block_size
        return self._placed(call) if call.has_ended else []

    def removed(self, hashes: Iterable[BlockHash]) -> list[int]:
        """Note blocks that the engine holds no more."""
        gone: list[int] = []
        for block in hashes:
            self._held.discard(block)
            gone += self._ends.pop(block, ())
        return gone

    def cleared(self) -> None:
        """Note that the engine holds nothing any more."""
        self._held.clear()
        self._ends.clear()
        for call in self._calls.values():
            call.blocks.clear()

    def lost(self) -> None:
        """Forget all blocks: what was told of them since is not known. No piece is let go."""
        self._held.clear()
        self._ends.clear()
        self._calls.clear()

    def _placed(self, call: _Call) -> list[int]:
        """Find the blocks that the pieces of a prompt end in, once all are reported."""
        size, num_tokens = call.block_size, call.num_prompt_tokens
        if not size or len(call.blocks) < num_tokens // size:
            return []
        del self._calls[call.request.request_id]
        per_token = num_tokens / call.request.num_prompt_tokens
        gone: list[int] = []
        end = 0.0
        for piece in call.request.prefix:
            chain_hash = piece.chain_hash
            end += per_token * piece.num_tokens
            index = max(0, int(end) - 1) // size
            if index >= len(call.blocks):
                break
            block = call.blocks[index]
            if block not in self._held:
                gone.append(chain_hash)
                continue
            pieces = self._ends.setdefault(block, [])
            if chain_hash not in pieces:
                pieces.append(chain_hash)
        return gone
