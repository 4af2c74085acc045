"""The calls of an engine that decode, all one token per step, as sums instead of a list.

Steps are counted. A call that has computed `c` tokens at count `k` gets `base = c − k`, and as
long as it misses no step it has computed `base + count` tokens. So context, KV blocks and the
next end follow from sums over the calls, for any number of steps ahead.
"""

from __future__ import annotations

import heapq

from vllm_workflow.sim.live import LiveCall


class DecodeBatch:
    """Decoding calls of one engine.

    Args:
        block_size: Tokens of a KV block.
    """

    __slots__ = (
        "_block_size",
        "_finishes",
        "_num_by_residue",
        "_num_joined",
        "num_calls",
        "num_steps",
        "sum_base",
    )

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self.num_steps = 0
        """Steps so far."""
        self.num_calls = 0
        self.sum_base = 0
        """Context of the next step is this plus `num_calls · (num_steps + 1)`."""
        self._num_by_residue = [0] * block_size
        """Calls by `base` modulo the block size, which says when they begin a block."""
        self._finishes: list[tuple[int, int, LiveCall]] = []
        """(count of steps, tie-breaker, call); those of calls that left or missed a step are
        dead."""
        self._num_joined = 0

    def join(self, call: LiveCall) -> None:
        """Take in a call that has its first output token since it was admitted."""
        call.is_decoding = True
        call.base = base = call.num_computed - self.num_steps
        self.num_calls += 1
        self.sum_base += base
        self._num_by_residue[base % self._block_size] += 1
        self._finish_at(call, self.num_steps + call.num_output - call.num_generated)

    def linger(self, call: LiveCall) -> None:
        """Take in a call that has all its tokens, until it is told to `leave`."""
        call.is_decoding = True
        call.base = base = call.num_computed - self.num_steps
        call.finish_at = self.num_steps
        self.num_calls += 1
        self.sum_base += base
        self._num_by_residue[base % self._block_size] += 1

    def leave(self, call: LiveCall) -> None:
        """Let a call go, with its tokens as of now."""
        base, num_steps = call.base, self.num_steps
        call.num_computed = base + num_steps
        call.num_generated = call.num_output - (call.finish_at - num_steps)
        call.is_decoding = False
        self.num_calls -= 1
        self.sum_base -= base
        self._num_by_residue[base % self._block_size] -= 1

    def miss(self, call: LiveCall) -> None:
        """Let a call not take part in the next step."""
        call.missed_step = self.num_steps
        self._num_by_residue[call.base % self._block_size] -= 1
        call.base -= 1
        self.sum_base -= 1
        self._num_by_residue[call.base % self._block_size] += 1
        self._finish_at(call, call.finish_at + 1)

    def finished(self) -> list[LiveCall]:
        """Let the calls go that have all their tokens by now."""
        done: list[LiveCall] = []
        finishes, num_steps = self._finishes, self.num_steps
        while finishes and finishes[0][0] <= num_steps:
            finish_at, _, call = heapq.heappop(finishes)
            if call.is_decoding and call.finish_at == finish_at:
                self.leave(call)
                done.append(call)
        return done

    def num_computed(self, call: LiveCall) -> int:
        """Tokens that a running call has computed, decoding or not."""
        return call.base + self.num_steps if call.is_decoding else call.num_computed

    def begins_block(self, call: LiveCall) -> bool:
        """Whether a call needs a KV block for the next step."""
        return (call.base + self.num_steps) % self._block_size == 0

    def num_blocks_next(self) -> int:
        """KV blocks that the next step needs."""
        return self._num_by_residue[-self.num_steps % self._block_size]

    def num_blocks(self, first_step: int, num_steps: int) -> int:
        """KV blocks that `num_steps` steps need, `first_step` steps from now on."""
        size = self._block_size
        num_cycles, num_further = divmod(num_steps, size)
        num_blocks = num_cycles * self.num_calls
        if num_further:  # calls whose residues are `last`, `last − 1`, … begin a block in turn
            last = -(self.num_steps + first_step) % size
            first = last - num_further + 1
            if first >= 0:
                num_blocks += sum(self._num_by_residue[first : last + 1])
            else:
                num_blocks += sum(self._num_by_residue[: last + 1])
                num_blocks += sum(self._num_by_residue[first:])
        return num_blocks

    def num_steps_to_finish(self) -> int:
        """Steps until the first call ends; there must be a call."""
        finishes = self._finishes
        while True:
            finish_at, _, call = finishes[0]
            if call.is_decoding and call.finish_at == finish_at:
                return finish_at - self.num_steps
            heapq.heappop(finishes)

    def num_steps_with_blocks(self, num_steps: int, num_free_blocks: int) -> int:
        """Of `num_steps` steps those that the free blocks last for, the first being paid for."""
        if self.num_calls * (num_steps // self._block_size + 1) <= num_free_blocks:
            return num_steps
        num_cycles = min(num_free_blocks // self.num_calls, num_steps // self._block_size)
        num_free_blocks -= num_cycles * self.num_calls
        step = 1 + num_cycles * self._block_size
        while step < num_steps:
            num_free_blocks -= self._num_by_residue[-(self.num_steps + step) % self._block_size]
            if num_free_blocks < 0:
                break
            step += 1
        return min(step, num_steps)

    def _finish_at(self, call: LiveCall, num_steps: int) -> None:
        call.finish_at = num_steps
        self._num_joined += 1
        heapq.heappush(self._finishes, (num_steps, self._num_joined, call))
