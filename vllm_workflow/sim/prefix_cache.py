"""The KV blocks of one engine, and which prompts' heads they hold.

Does what vLLM's block pool does: blocks fill as tokens are scheduled, a full block can be hit
from typing import Final
from then on, freed blocks stay until they are the least recently freed, the last block of a
prompt first. Blocks are kept in extents, neighbours that live and die together, so that the cost
depends on how many parts a prompt has, not on how many blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from vllm_workflow.sim.types import PrefixPart

_ENDLESS: Final = 1 << 62


class PrefixNode:
    """The blocks whose last token lies in one part of a prompt, given all parts before it."""

    __slots__ = ("children", "end", "extents", "start")

    def __init__(self, start: int, end: int) -> None:
        self.start = start
        """Index of its first block within a prompt."""
        self.end = end
        self.children: dict[tuple[str, int], PrefixNode] = {}
        self.extents: list[Extent] = []
        """Cached blocks in the order in which they were first computed; they may overlap where
        two calls computed the same blocks side by side."""


class Extent:
    """Blocks `[lo, hi)` of a node that the same calls hold; free if nobody does."""

    __slots__ = ("after", "before", "hi", "holders", "lo", "node")

    def __init__(self, node: PrefixNode | None, lo: int, hi: int) -> None:
        self.node = node
        """None for blocks that no prompt can hit."""
        self.lo = lo
        self.hi = hi
        self.holders: list[BlockTable] = []
        self.before = self.after = self
        """Neighbours in the order of eviction, while it is free."""


class BlockTable:
    """The blocks of one call."""

    __slots__ = ("extents", "nodes", "num_blocks", "num_registered", "num_shared")

    def __init__(self, nodes: list[PrefixNode]) -> None:
        self.nodes = nodes
        self.num_shared = nodes[-1].end if nodes else 0
        """Leading blocks that another prompt may have too."""
        self.extents: list[Extent] = []
        self.num_blocks = 0
        self.num_registered = 0
        """Leading blocks that are in `extents`; the others are this call's own."""


Hit = tuple[Extent, int, int]
"""Blocks `[lo, hi)` of an extent."""


class BlockPool:
    """All KV blocks of an engine.

    Args:
        num_blocks: Blocks that calls can hold.
        block_size: Tokens of a block.
    """

    __slots__ = ("_lru", "_num_empty", "_root", "block_size", "num_blocks", "num_free")

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_free = num_blocks
        """Blocks that no call holds, those that can be hit included."""
        self._num_empty = num_blocks
        self._root = PrefixNode(0, 0)
        self._lru = Extent(None, 0, 0)

    def table(self, prefix: Sequence[PrefixPart], num_prompt_tokens: int) -> BlockTable:
        """Return an empty table for a prompt that starts with `prefix`."""
        nodes: list[PrefixNode] = []
        node = self._root
        num_tokens = start = 0
        for part in prefix:
            num_tokens += part.num_tokens
            if num_tokens > num_prompt_tokens:
                break
            key = (part.part_id, part.num_tokens)
            child = node.children.get(key)
            if child is None:
                child = node.children[key] = PrefixNode(start, num_tokens // self.block_size)
            node = child
            if node.end > start:
                nodes.append(node)
                start = node.end
        return BlockTable(nodes)

    def lookup(self, table: BlockTable, max_blocks: int) -> tuple[list[Hit], int, int]:
        """Find the longest cached head of a prompt, at most `max_blocks`.

        Returns:
            What to `touch`; how many blocks that is; how many of them are free now.
        """
        hits: list[Hit] = []
        at = num_free = 0
        for node in table.nodes:
            end = node.end if node.end < max_blocks else max_blocks
            while at < end:
                hit = _first_covering(node.extents, at, end)
                if hit is None:
                    return hits, at, num_free
                hits.append(hit)
                if not hit[0].holders:
                    num_free += hit[2] - at
                at = hit[2]
            if at < node.end:
                break
        return hits, at, num_free

    def touch(self, table: BlockTable, hits: list[Hit], num_hit_blocks: int) -> None:
        """Let an empty table hold what `lookup` found for it, nothing having changed since."""
        for extent, lo, hi in hits:
            if lo > extent.lo:
                self._split(extent, lo)
            held = self._split(extent, hi) if hi < extent.hi else extent
            if not held.holders:
                _unlink(held)
                self.num_free -= hi - lo
            held.holders.append(table)
            table.extents.append(held)
        table.num_blocks = table.num_registered = num_hit_blocks

    def grow(self, table: BlockTable, num_tokens: int) -> None:
        """Give a table the blocks for its first `num_tokens` tokens; they must be free."""
        num_blocks = -(-num_tokens // self.block_size)
        self.take(num_blocks - table.num_blocks)
        table.num_blocks = num_blocks
        num_full = min(num_tokens // self.block_size, table.num_shared)
        lo = table.num_registered
        if lo < num_full:
            for node in table.nodes:
                if node.end > lo:
                    hi = min(node.end, num_full)
                    self._register(table, node, lo, hi)
                    lo = hi
                    if lo == num_full:
                        break
            table.num_registered = num_full

    def num_own_blocks(self, table: BlockTable, num_tokens: int) -> int:
        """Blocks of a call's first `num_tokens` tokens that no other call holds."""
        num_blocks = -(-num_tokens // self.block_size)
        return num_blocks - sum(e.hi - e.lo for e in table.extents if len(e.holders) > 1)

    def take(self, num_blocks: int) -> None:
        """Make free blocks held, the least recently freed first; there must be enough."""
        self.num_free -= num_blocks
        if num_blocks <= self._num_empty:
            self._num_empty -= num_blocks
            return
        num_blocks -= self._num_empty
        self._num_empty = 0
        lru = self._lru
        while num_blocks:
            extent = lru.after
            size = extent.hi - extent.lo
            if size > num_blocks:
                extent.hi -= num_blocks
                return
            num_blocks -= size
            _unlink(extent)
            if extent.node is not None:
                extent.node.extents.remove(extent)

    def free(
        self,
        table: BlockTable,
        num_tokens: int,
        *,
        may_return: bool = False,
        num_unknown: int = 0,
    ) -> None:
        """Let go of the blocks of a call's first `num_tokens` tokens, which are computed.

        Args:
            table: Empty afterwards.
            num_tokens: How many it computed. Its own blocks for them count as held even where
                `grow` was not called for them, but `take` was.
            may_return: The call will come back and hit its own blocks, if they are still there.
            num_unknown: Of these tokens, the last ones that nobody knew yet; a block with one of
                them cannot be hit.
        """
        num_full = (num_tokens - num_unknown) // self.block_size
        num_blocks = -(-num_tokens // self.block_size)
        num_partial = num_blocks - num_full
        self._num_empty += num_partial
        lo = table.num_registered
        self.num_free += num_blocks - lo
        if lo < num_full:
            own = Extent(None, lo, num_full)
            if may_return:
                own.node = self._own_node(table)
                own.node.extents.append(own)
            self._link(own)
        for extent in reversed(table.extents):
            extent.holders.remove(table)
            if not extent.holders:
                self.num_free += extent.hi - extent.lo
                self._link(extent)
        table.extents = []
        table.num_blocks = table.num_registered = 0

    def _own_node(self, table: BlockTable) -> PrefixNode:
        if not table.nodes or table.nodes[-1].end != _ENDLESS:
            table.nodes.append(PrefixNode(table.num_shared, _ENDLESS))
        return table.nodes[-1]

    def _register(self, table: BlockTable, node: PrefixNode, lo: int, hi: int) -> None:
        """Note that a call fills the blocks `[lo, hi)` of a node."""
        if node.extents and table.extents and node.extents[-1] is table.extents[-1]:
            last = node.extents[-1]
            if last.hi == lo and len(last.holders) == 1:
                last.hi = hi
                return
        extent = Extent(node, lo, hi)
        extent.holders.append(table)
        table.extents.append(extent)
        node.extents.append(extent)

    def _split(self, extent: Extent, at: int) -> Extent:
        """Cut an extent in two and return its head; the tail keeps the identity."""
        head = Extent(extent.node, extent.lo, at)
        extent.lo = at
        if extent.node is not None:
            siblings = extent.node.extents
            siblings.insert(siblings.index(extent), head)
        if not extent.holders:  # the tail is evicted first
            _insert(head, extent)
        for table in extent.holders:
            head.holders.append(table)
            table.extents.insert(table.extents.index(extent), head)
        return head

    def _link(self, extent: Extent) -> None:
        _insert(extent, self._lru.before)


def _first_covering(extents: list[Extent], at: int, end: int) -> Hit | None:
    """Blocks from `at` in the extent computed first, as far as no earlier one has the next."""
    for index, extent in enumerate(extents):
        if extent.lo <= at < extent.hi:
            hi = extent.hi if extent.hi < end else end
            for earlier in extents[:index]:
                if at < earlier.lo < hi:
                    hi = earlier.lo
            return extent, at, hi
    return None


def _insert(extent: Extent, before: Extent) -> None:
    after = before.after
    extent.before, extent.after = before, after
    before.after = after.before = extent


def _unlink(extent: Extent) -> None:
    extent.before.after, extent.after.before = extent.after, extent.before
