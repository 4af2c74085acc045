"""Level 1: one vLLM engine as a chain of events, with closed forms between them.

The engine does what vLLM's V1 scheduler does: running calls first, in order, then the head of
the queue while there are seats, tokens and KV blocks; prompts in chunks; the last of the running
loses its blocks when they run out, and computes again. Order and seat preemption are those of
the engine plug-in.

A step with prompt tokens in it is an event of its own. Between two such steps nothing but
decoding happens: the n-th of these steps takes `first_s + n · B · per_kv_token_s`, an
arithmetic series, so that where a later event falls is solved for, not stepped to.

With asynchronous scheduling a step is planned when the step before it starts. Nothing happens
to what is planned in between, so here too it is made when it begins, but as it was then known:
calls that came during the step before are not seen yet, and calls that ended with it take part
once more and keep their seat and blocks as long.
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Sequence
from operator import attrgetter

from vllm_workflow.core.config import PolicyConfig
from vllm_workflow.core.errors import ConfigError
from vllm_workflow.core.latency import LatencyModel, prefill_attention
from vllm_workflow.sim.decode_batch import DecodeBatch
from vllm_workflow.sim.live import LiveCall, Ranking, WaitingLine
from vllm_workflow.sim.prefix_cache import BlockPool
from vllm_workflow.sim.seats import SeatPreemption
from vllm_workflow.sim.step_series import StepSeries
from vllm_workflow.sim.types import EngineEvent, EngineRequest, EventKind

DEFAULT_BLOCK_SIZE = 16
_BY_RANK = attrgetter("rank")


class EventEngine:
    """A `SimEngine` that costs time per event, not per step.

    Args:
        instance_id: Its name.
        latency: Step times; `max_num_batched_tokens` is the token budget of a step.
        config: Order, and seat preemption.
        max_num_seqs: Calls that run side by side.
        num_kv_blocks: As vLLM reports them. One of these holds nothing, there as here.
        block_size: Tokens of a KV block.
        async_scheduling: As vLLM does on GPUs; without it a step is planned when it begins.

    Raises:
        ConfigError: No seat, or no block.
    """

    def __init__(
        self,
        instance_id: str,
        latency: LatencyModel,
        *,
        config: PolicyConfig | None = None,
        max_num_seqs: int = 128,
        num_kv_blocks: int = 1 << 20,
        block_size: int = DEFAULT_BLOCK_SIZE,
        async_scheduling: bool = False,
    ) -> None:
        _require(instance_id, "max_num_seqs", max_num_seqs, 1)
        _require(instance_id, "num_kv_blocks", num_kv_blocks, 2)
        _require(instance_id, "block_size", block_size, 1)
        config = config or PolicyConfig()
        self.instance_id = instance_id
        self.pool = BlockPool(num_kv_blocks - 1, block_size)
        self._ranking = Ranking(config)
        self._reorders = self._ranking.reorders
        self._max_num_seqs = max_num_seqs
        self._max_tokens = int(latency.max_num_batched_tokens)
        self._block_size = block_size
        self._prefill_cap = config.prefill_chunk_cap
        self._urgent_slack_s = config.urgent_slack_s
        self._cooldown_s = config.preempt_cooldown_s
        self._set_latency(latency)
        self._calls: dict[str, LiveCall] = {}
        self._running: list[LiveCall] = []
        self._waiting = WaitingLine()
        self._queued = self._waiting.places
        self._num_aborted = 0
        self._is_async = async_scheduling
        self._unseen: list[LiveCall] = []
        """Calls that came too late for the next step, which is planned already."""
        self._lingering: list[LiveCall] = []
        """Calls that have ended but take part in the step that was planned before."""
        self._decoding = DecodeBatch(block_size)
        self._seats = None
        if config.preempt:
            self._seats = SeatPreemption(
                config,
                self._running,
                self._waiting,
                self.pool,
                max_num_seqs,
                self._preempt,
                self._decoding.num_computed,
            )
        self._prefilling: list[LiveCall] = []
        # The steps under way: none of them, `inf`; one with prompt tokens; or several without.
        self._end = math.inf
        self._steps = StepSeries()
        self._num_steps = 0
        self._chunks: list[LiveCall] = []
        self.num_prefill_tokens = 0
        """Tokens of prompts computed; of answers too, where a preempted call resumed."""

    def submit(self, request: EngineRequest, now: float) -> None:
        """Enqueue a call.

        Raises:
            ValueError: Its id is in use, or it is longer than all KV blocks together.
        """
        told = request.request
        if told.request_id in self._calls:
            raise ValueError(
                f"instance {self.instance_id!r}: call {told.request_id!r} is there already"
            )
        num_tokens = request.num_prompt_tokens + max(1, request.num_output_tokens) - 1
        if num_tokens > self.pool.num_blocks * self._block_size:
            raise ConfigError(
                f"instance {self.instance_id!r}: call {told.request_id!r}: expected at most "
                f"{self.pool.num_blocks * self._block_size} tokens, which is all its KV cache "
                f"holds, got {num_tokens}"
            )
        table = self.pool.table(request.prefix, request.num_prompt_tokens)
        call = LiveCall(request, table)
        self._ranking.place(call, told)
        self._calls[call.request_id] = call
        if self._is_async and self._num_steps:
            self._see_later(call, now)
            return
        self._waiting.append(call)
        if self._end == math.inf:
            self._end = now
        elif self._num_steps > 1:
            self._cut_short(self._steps.num_steps_until(now))

    def abort(self, request_id: str, now: float) -> None:
        """Forget a call; a running one leaves at the end of the step under way."""
        call = self._calls.pop(request_id, None)
        if call is None:
            return
        if call.is_running:
            call.is_aborted = True
            self._num_aborted += 1
        else:
            self._waiting.remove(call)
            if call in self._unseen:
                self._unseen.remove(call)
        if self._num_steps > 1:
            self._cut_short(self._steps.num_steps_until(now))

    def next_event_time(self) -> float:
        return self._end

    def advance(self, now: float) -> list[EngineEvent]:
        events: list[EngineEvent] = []
        while self._end <= now:
            end = self._end
            if self._num_steps:
                self._complete(end, events)
            self._begin(end)
        return events

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_preempted_for_urgent(self) -> int:
        """Calls that lost their seat to an urgent one."""
        return self._seats.num_preempted if self._seats else 0

    # The step that ends.

    def _complete(self, now: float, events: list[EngineEvent]) -> None:
        """Count the tokens of the steps that end now, and let go of calls that end with them."""
        decoding = self._decoding
        if self._num_steps > 1:  # the blocks of the first step were taken when it began
            self.pool.take(decoding.num_blocks(1, self._num_steps - 1))
        decoding.num_steps += self._num_steps
        seats = self._seats
        if seats:
            seats.learn()  # of the step before this one
            if self._chunks:
                num_tokens = sum(call.chunk for call in self._chunks) - len(self._chunks)
                seats.note_prefill(now - self._steps.start, num_tokens)
        done = self._complete_prefills(now, events) if self._chunks else []
        if self._lingering:
            self._release()
        for call in decoding.finished():
            if not call.is_aborted:
                done.append(call)
        if self._num_aborted:
            self._drop_aborted()
        if len(done) > 1:
            done.sort(key=self._running.index)
        for call in done:
            del self._calls[call.request_id]
            events.append(_event(call, now, EventKind.FINISHED))
            if seats:
                seats.note_departure(now)
            if self._is_async:
                self._decoding.linger(call)
                self._lingering.append(call)
            else:
                self._running.remove(call)
                self.pool.free(call.table, call.num_computed)

    def _complete_prefills(self, now: float, events: list[EngineEvent]) -> list[LiveCall]:
        """Count the prompt tokens of the step that ends; return the calls of one output token."""
        done: list[LiveCall] = []
        for call in self._chunks:
            self.num_prefill_tokens += call.chunk
            call.num_computed += call.chunk
            if call.num_computed == call.prefill_end and not call.is_aborted:
                self._prefilling.remove(call)
                if not call.num_generated:
                    events.append(_event(call, now, EventKind.FIRST_TOKEN))
                call.num_generated += 1
                if call.num_generated == call.num_output:
                    done.append(call)
                else:
                    self._decoding.join(call)
        return done

    def _drop_aborted(self) -> None:
        self._lingering = [c for c in self._running if c.is_aborted]
        if not self._is_async:
            self._release()
        self._num_aborted = 0

    def _release(self) -> None:
        """Let go of the seats and blocks of calls that have ended."""
        for call in self._lingering:
            if call.is_decoding:
                self._decoding.leave(call)
            elif call in self._prefilling:
                self._prefilling.remove(call)
            self._running.remove(call)
            self.pool.free(call.table, call.num_computed)
        self._lingering = []

    def _preempt(self, call: LiveCall) -> None:
        """Send a running call back to the queue; what it computed is lost but for the cache."""
        self._running.remove(call)
        if call.is_decoding:
            self._decoding.leave(call)
        else:
            self._prefilling.remove(call)
        # The token of a step that is still under way when the next one is planned.
        num_unknown = int(self._is_async and call.num_computed > call.prefill_end)
        self.pool.free(call.table, call.num_computed, may_return=True, num_unknown=num_unknown)
        call.prefill_end = call.num_prompt + call.num_generated
        call.num_computed = 0
        call.num_preemptions += 1
        call.is_running = False
        if call in self._lingering:
            self._lingering.remove(call)
        else:
            self._waiting.prepend(call)

    # The step that begins.

    def _begin(self, now: float) -> None:
        """Make the next step, and find out how many like it follow."""
        self._chunks = []
        queued, seats, planned_at = self._queued, self._seats, now
        if not self._running and not queued:
            if not self._unseen:
                self._num_steps = 0
                self._end = math.inf
                return
            self._see()
        elif self._is_async and self._num_steps:
            planned_at = self._steps.end(self._num_steps - 1)
        is_special, cap = bool(self._unseen or self._lingering), 0
        if queued:
            self._put_off_late(planned_at)
        if seats:
            if not self._is_async or not self._num_steps:
                seats.learn()
            if queued and self._running:
                is_special |= seats.make_room(planned_at) or seats.has_news
        if self._prefill_cap and self._is_urgent_one_present(planned_at):
            cap = self._prefill_cap
        num_preempted, tokens_left, num_idle = self._schedule_running(planned_at, cap)
        if queued and not num_preempted:
            tokens_left = self._admit_waiting(planned_at, tokens_left, cap)
        if seats and (queued or seats.starved):
            is_special |= seats.note_step(planned_at, has_token_budget=tokens_left > 0)
        num_decoding = self._decoding.num_calls - num_idle
        if self._is_async and self._num_steps and not num_decoding and not self._chunks:
            # Nothing could be planned ahead: it is planned when the step before has ended.
            self._release()
            self._see()
            self._num_steps = 0
            self._begin(now)
            return
        steps = self._steps
        steps.start = now
        steps.first_s = first_s = self._step_s(num_decoding)
        if self._chunks or num_preempted or num_idle or is_special:
            self._num_steps = 1
            self._end = now + first_s
        else:
            steps.growth_s = num_decoding * self._per_kv_token_s
            self._num_steps = num_steps = self._num_steps_alike(planned_at)
            self._end = steps.end(num_steps)
        if self._unseen:
            self._see()

    def _put_off_late(self, now: float) -> None:
        """Let the head of the queue be a call that can still be on time, if there is any."""
        waiting, ranking = self._waiting, self._ranking
        while ranking.put_off_from(head := waiting.head()) < now:
            ranking.put_off(head)
            waiting.rekey(head)

    def _see_later(self, call: LiveCall, now: float) -> None:
        """Enqueue a call while steps are under way; the next of them is planned already."""
        num_steps = 1 if self._num_steps == 1 else self._steps.num_steps_until(now)
        if num_steps < self._num_steps:
            self._waiting.append(call)
            self._cut_short(num_steps + 1)
        else:
            self._unseen.append(call)

    def _see(self) -> None:
        for call in self._unseen:
            self._waiting.append(call)
        self._unseen = []

    def _schedule_running(self, now: float, cap: int) -> tuple[int, int, int]:
        """Give the running calls their tokens and blocks.

        Returns:
            How many were preempted for it; tokens left of the budget; how many decoding calls
            got none.
        """
        tokens_left = self._max_tokens - self._decoding.num_calls
        num_needed = self._decoding.num_blocks_next()
        if not self._prefilling and tokens_left >= 0 and num_needed <= self.pool.num_free:
            if num_needed:
                self.pool.take(num_needed)
            return 0, tokens_left, 0
        return self._walk_running(now, cap)

    def _walk_running(self, now: float, cap: int) -> tuple[int, int, int]:
        """`_schedule_running`, call by call."""
        pool, running, size = self.pool, self._running, self._block_size
        tokens_left, num_preempted, index = self._max_tokens, 0, 0
        while index < len(running) and tokens_left > 0:
            call = running[index]
            if call.is_decoding:
                num_tokens = 1
                num_needed = int(self._decoding.begins_block(call))
            else:
                num_tokens = min(call.prefill_end - call.num_computed, tokens_left)
                if 0 < cap < num_tokens and not call.is_urgent(now, self._urgent_slack_s):
                    num_tokens = cap
                num_needed = -(-(call.num_computed + num_tokens) // size) - call.table.num_blocks
            while num_needed > pool.num_free:
                victim = running[-1]
                self._preempt(victim)
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
                self._chunks.append(call)
            tokens_left -= num_tokens
            index += 1
        return num_preempted, tokens_left, self._skip(running[index:])

    def _skip(self, calls: Sequence[LiveCall]) -> int:
        """Let decoding calls miss the step that begins."""
        num_idle = self._idle_base = 0
        for call in calls:
            if call.is_decoding:
                num_idle += 1
                self._decoding.miss(call)
                self._idle_base += call.base
        return num_idle

    def _admit_waiting(self, now: float, tokens_left: int, cap: int) -> int:
        """Take calls from the queue while there are seats, tokens and blocks."""
        waiting, running, pool = self._waiting, self._running, self.pool
        size = self._block_size
        while self._queued and tokens_left > 0 and len(running) < self._max_num_seqs:
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
        self._chunks.append(call)
        self._prefilling.append(call)
        if self._reorders:
            insort(self._running, call, key=_BY_RANK)
        else:
            self._running.append(call)

    def _is_urgent_one_present(self, now: float) -> bool:
        calls = self._running[:1]
        if self._waiting:
            calls.append(self._waiting.head())
        return any(call.is_urgent(now, self._urgent_slack_s) for call in calls)

    # How long it takes.

    def _set_latency(self, latency: LatencyModel) -> None:
        self._fixed_s = latency.overhead_s + latency.weights_s
        self._below_s = latency.per_token_below_knee_s
        self._above_s = latency.per_token_s - latency.per_token_below_knee_s
        self._knee = latency.knee_tokens
        self._per_seq_s = latency.per_seq_s
        self._per_kv_token_s = latency.per_kv_token_s
        self._per_prefill_kv_token_s = latency.per_prefill_kv_token_s
        self._idle_base = 0

    def _step_s(self, num_decoding: int) -> float:
        """Seconds of the step that begins; `LatencyModel.step_s` without its calls."""
        context = self._decoding.sum_base + num_decoding * (self._decoding.num_steps + 1)
        if self._idle_base:
            context -= self._idle_base
            self._idle_base = 0
        num_tokens = num_decoding
        attention = 0.0
        for call in self._chunks:
            num_tokens += call.chunk
            if call.chunk == 1 and call.num_computed >= call.num_prompt:
                # Back from the queue with all but its last token cached: as good as decoding.
                num_decoding += 1
                context += call.num_computed + 1
            else:
                attention += prefill_attention(call.chunk, call.num_computed)
        step_s = (
            self._fixed_s
            + num_tokens * self._below_s
            + num_decoding * self._per_seq_s
            + context * self._per_kv_token_s
            + attention * self._per_prefill_kv_token_s
        )
        if num_tokens > self._knee:
            step_s += (num_tokens - self._knee) * self._above_s
        return step_s

    def _cut_short(self, num_steps: int) -> None:
        """Let the steps under way be `num_steps` at most."""
        if num_steps < self._num_steps:
            self._num_steps = num_steps
            self._end = self._steps.end(num_steps)

    def _num_steps_alike(self, now: float) -> int:
        """Steps until a call ends, KV blocks run out, or a waiting call becomes urgent."""
        num_steps = self._decoding.num_steps_to_finish()
        if num_steps == 1:
            return 1
        num_steps = self._decoding.num_steps_with_blocks(num_steps, self.pool.num_free)
        if self._queued:
            until = self._ranking.put_off_from(self._waiting.head())
            if self._seats:
                until = min(until, self._seats.quiet_until(now))
            if until < self._steps.end(num_steps):
                num_steps = min(num_steps, self._steps.num_steps_until(until))
        return num_steps


def _event(call: LiveCall, now: float, kind: EventKind) -> EngineEvent:
    return EngineEvent(now, call.request_id, kind, call.num_cached, call.num_preemptions)


def _require(instance_id: str, name: str, value: int, least: int) -> None:
    if value < least:
        raise ConfigError(
            f"instance {instance_id!r}: {name}: expected at least {least}, got {value}"
        )
