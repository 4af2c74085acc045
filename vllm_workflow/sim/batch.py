"""The calls of one engine, and what each of them gets of the next step.

As vLLM's V1 scheduler: running calls first, in order, then the head of the queue while there are
seats, tokens and KV blocks; prompts in chunks; the last of the running loses its blocks when they
run out, and computes again.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence
from operator import attrgetter

from vllm_workflow.core.config import PolicyConfig
from vllm_workflow.sim.decode_batch import DecodeBatch
from vllm_workflow.sim.live import LiveCall, WaitingLine
from vllm_workflow.sim.prefix_cache import BlockPool
from vllm_workflow.sim.seats import SeatPreemption

_BY_RANK = attrgetter("rank")


class Batch:
    """Plans the steps of one engine.

    Args:
        config: Seat preemption, and the cap of prefill chunks.
        pool: The KV blocks.
        max_num_seqs: Calls that run side by side.
        max_num_tokens: Token budget of a step.
        is_async: A step is planned when the one before it begins.
        reorders: Running calls are kept in order of rank, not of admission.
    """

    __slots__ = (
        "_cooldown_s",
        "_is_async",
        "_max_num_seqs",
        "_max_num_tokens",
        "_prefill_cap",
        "_reorders",
        "_urgent_slack_s",
        "chunks",
        "decoding",
        "idle_base",
        "lingering",
        "pool",
        "prefilling",
        "queued",
        "running",
        "seats",
        "waiting",
    )

    def __init__(
        self,
        config: PolicyConfig,
        pool: BlockPool,
        *,
        max_num_seqs: int,
        max_num_tokens: int,
        is_async: bool,
        reorders: bool,
    ) -> None:
        self.pool = pool
        self._max_num_seqs = max_num_seqs
        self._max_num_tokens = max_num_tokens
        self._is_async = is_async
        self._reorders = reorders
        # Where vLLM's own order stays, the plug-in caps nothing either.
        self._prefill_cap = config.prefill_chunk_cap if reorders else 0
        self._urgent_slack_s = config.urgent_slack_s
        self._cooldown_s = config.preempt_cooldown_s
        self.running: list[LiveCall] = []
        self.waiting = WaitingLine()
        self.queued = self.waiting.places
        """Not empty while a call waits."""
        self.prefilling: list[LiveCall] = []
        self.decoding = DecodeBatch(pool.block_size)
        self.lingering: list[LiveCall] = []
        """Calls that have ended but take part in the step that was planned before."""
        self.chunks: list[LiveCall] = []
        """Calls of which the step at hand computes prompt tokens."""
        self.idle_base = 0
        """Of the decoding calls that miss the step at hand, summed; see `DecodeBatch`."""
        self.seats = None
        if config.preempt:
            self.seats = SeatPreemption(
                config,
                self.running,
                self.waiting,
                pool,
                max_num_seqs,
                self.preempt,
                self.decoding.num_computed,
            )

    def preempt(self, call: LiveCall) -> None:
        """Send a running call back to the queue; what it computed is lost but for the cache."""
        self.running.remove(call)
        if call.is_decoding:
            self.decoding.leave(call)
        else:
            self.prefilling.remove(call)
        # The token that it computes in a step under way, unless it was known when that was planned.
        num_unknown = int(
            self._is_async
            and call.num_computed > call.prefill_end
            and call.missed_step < self.decoding.num_steps - 2
        )
        self.pool.free(call.table, call.num_computed, may_return=True, num_unknown=num_unknown)
        call.prefill_end = call.num_prompt + call.num_generated
        call.num_computed = 0
        call.num_preemptions += 1
        call.is_running = False
        if call in self.lingering:
            self.lingering.remove(call)
        else:
            self.waiting.prepend(call)

    def schedule_running(self, now: float, cap: int) -> tuple[int, int, int]:
        """Give the running calls their tokens and blocks.

        Returns:
            How many were preempted for it; tokens left of the budget; how many decoding calls
            got none.
        """
        tokens_left = self._max_num_tokens - self.decoding.num_calls
        num_needed = self.decoding.num_blocks_next()
        if not self.prefilling and tokens_left >= 0 and num_needed <= self.pool.num_free:
            if num_needed:
                self.pool.take(num_needed)
            return 0, tokens_left, 0
        return self._walk_running(now, cap)

    def _walk_running(self, now: float, cap: int) -> tuple[int, int, int]:
        """`_schedule_running`, call by call."""
        pool, running, size = self.pool, self.running, self.pool.block_size
        tokens_left, num_preempted, index = self._max_num_tokens, 0, 0
        while index < len(running) and tokens_left > 0:
            call = running[index]
            if call.is_decoding:
                num_tokens = 1
                num_needed = int(self.decoding.begins_block(call))
            else:
                num_tokens = min(call.prefill_end - call.num_computed, tokens_left)
                if 0 < cap < num_tokens and not call.is_urgent(now, self._urgent_slack_s):
                    num_tokens = cap
                num_needed = -(-(call.num_computed + num_tokens) // size) - call.table.num_blocks
            while num_needed > pool.num_free:
                victim = running[-1]
                self.preempt(victim)
                num_preempted += 1
                if victim is call:
                    break
            if not call.is_running:
                break
            if call.is_decoding:
                pool.take(num_needed)
            else:
                call.chunk = num_tokens
                pool.grow(call.table, call.num_computed + num_tokens)
                self.chunks.append(call)
            tokens_left -= num_tokens
            index += 1
        return num_preempted, tokens_left, self._skip(running[index:])

    def _skip(self, calls: Sequence[LiveCall]) -> int:
        """Let decoding calls miss the step that begins."""
        num_idle = self.idle_base = 0
        for call in calls:
            if call.is_decoding:
                num_idle += 1
                self.decoding.miss(call)
                self.idle_base += call.base
        return num_idle

    def admit_waiting(self, now: float, tokens_left: int, cap: int) -> int:
        """Take calls from the queue while there are seats, tokens and blocks."""
        waiting, running, pool = self.waiting, self.running, self.pool
        size = self.pool.block_size
        while self.queued and tokens_left > 0 and len(running) < self._max_num_seqs:
            call = waiting.head()
            table, end = call.table, call.prefill_end
            # At least one token is computed, whose logits give the next one.
            hits, num_hit, num_hit_free = pool.lookup(table, (end - 1) // size)
            if -(-end // size) - num_hit + num_hit_free > pool.num_free:
                break
            waiting.pop()
            num_tokens = min(end - num_hit * size, tokens_left)
            if 0 < cap < num_tokens and not call.is_urgent(now, self._urgent_slack_s):
                num_tokens = cap
            pool.touch(table, hits, num_hit)
            call.num_computed = num_hit * size
            call.chunk = num_tokens
            pool.grow(table, call.num_computed + num_tokens)
            tokens_left -= num_tokens
            self._seat(call, now)
        return tokens_left

    def _seat(self, call: LiveCall, now: float) -> None:
        if call.was_admitted:
            call.protected_until = now + self._cooldown_s
        else:
            call.num_cached = call.num_computed
            call.was_admitted = True
        call.is_running = True
        self.chunks.append(call)
        self.prefilling.append(call)
        if self._reorders:
            insort(self.running, call, key=_BY_RANK)
        else:
            self.running.append(call)

    def cap(self, now: float) -> int:
        """Tokens of a slack-rich prefill in a step planned at `now`; 0: any number."""
        if not self._prefill_cap:
            return 0
        calls = self.running[:1]
        if self.queued:
            calls.append(self.waiting.head())
        is_urgent = any(call.is_urgent(now, self._urgent_slack_s) for call in calls)
        return self._prefill_cap if is_urgent else 0
