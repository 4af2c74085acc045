"""Level 1: one vLLM engine as a chain of events, with closed forms between them.

The engine does what vLLM's V1 scheduler does, see `sim.batch`. Order and seat preemption are those
of the engine plug-in.

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
from typing import Final

from vllm_workflow.core.config import PolicyConfig
from vllm_workflow.core.errors import ConfigError
from vllm_workflow.core.latency import LatencyModel, prefill_attention
from vllm_workflow.sim.batch import Batch
from vllm_workflow.sim.live import LiveCall, Ranking
from vllm_workflow.sim.prefix_cache import BlockPool
from vllm_workflow.sim.step_series import StepSeries
from vllm_workflow.sim.types import EngineEvent, EngineRequest, EventKind

_INF: Final = math.inf

DEFAULT_BLOCK_SIZE: Final = 16
MAX_PUT_OFF: Final = 64
"""Waiting calls that one step lets step back, as `engine.slack_order` does."""


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
        self._block_size = block_size
        self._is_async = async_scheduling
        self._batch = Batch(
            config,
            self.pool,
            max_num_seqs=max_num_seqs,
            max_num_tokens=int(latency.max_num_batched_tokens),
            is_async=async_scheduling,
            reorders=self._ranking.reorders,
        )
        self._running = self._batch.running
        self._waiting = self._batch.waiting
        self._queued = self._waiting.places
        self._decoding = self._batch.decoding
        self._set_latency(latency)
        self._calls: dict[str, LiveCall] = {}
        self._num_aborted = 0
        self._unseen: list[LiveCall] = []
        """Calls that came too late for the next step, which is planned already."""
        # The steps under way: none of them, `inf`; one with prompt tokens; or several without.
        self._end = _INF
        self._steps = StepSeries()
        self._num_steps = 0
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
        if self._end == _INF:
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
        seats = self._batch.seats
        return seats.num_preempted if seats else 0

    # The step that ends.

    def _complete(self, now: float, events: list[EngineEvent]) -> None:
        """Count the tokens of the steps that end now, and let go of calls that end with them."""
        decoding = self._decoding
        if self._num_steps > 1:  # the blocks of the first step were taken when it began
            self.pool.take(decoding.num_blocks(1, self._num_steps - 1))
        decoding.num_steps += self._num_steps
        seats, chunks = self._batch.seats, self._batch.chunks
        if seats:
            seats.learn()  # of the step before this one
            if chunks:
                num_tokens = sum(call.chunk for call in chunks) - len(chunks)
                seats.note_prefill(now - self._steps.start, num_tokens)
        done = self._complete_prefills(now, events) if chunks else []
        if self._batch.lingering:
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
                self._batch.lingering.append(call)
            else:
                self._running.remove(call)
                self.pool.free(call.table, call.num_computed)

    def _complete_prefills(self, now: float, events: list[EngineEvent]) -> list[LiveCall]:
        """Count the prompt tokens of the step that ends; return the calls of one output token."""
        done: list[LiveCall] = []
        for call in self._batch.chunks:
            self.num_prefill_tokens += call.chunk
            call.num_computed += call.chunk
            if call.num_computed == call.prefill_end and not call.is_aborted:
                self._batch.prefilling.remove(call)
                if not call.num_generated:
                    events.append(_event(call, now, EventKind.FIRST_TOKEN))
                call.num_generated += 1
                if call.num_generated == call.num_output:
                    done.append(call)
                else:
                    self._decoding.join(call)
        return done

    def _drop_aborted(self) -> None:
        self._batch.lingering = [c for c in self._running if c.is_aborted]
        if not self._is_async:
            self._release()
        self._num_aborted = 0

    def _release(self) -> None:
        """Let go of the seats and blocks of calls that have ended."""
        for call in self._batch.lingering:
            if call.is_decoding:
                self._decoding.leave(call)
            elif call in self._batch.prefilling:
                self._batch.prefilling.remove(call)
            self._running.remove(call)
            # Of the token that the step under way computes vLLM does not learn any more.
            num_unknown = call.num_computed - (call.num_prompt + call.num_output - 1)
            self.pool.free(call.table, call.num_computed, num_unknown=max(0, num_unknown))
        self._batch.lingering = []

    # The step that begins.

    def _begin(self, now: float) -> None:
        """Make the next step, and find out how many like it follow."""
        self._batch.chunks = []
        batch, queued, planned_at = self._batch, self._queued, now
        seats = batch.seats
        if not self._running and not queued:
            if not self._unseen:
                self._num_steps = 0
                self._end = _INF
                return
            self._see()
        elif self._is_async and self._num_steps:
            planned_at = self._steps.end(self._num_steps - 1)
        is_special = bool(self._unseen or batch.lingering)
        if queued:
            self._put_off_late(planned_at)
        if seats:
            if not self._is_async or not self._num_steps:
                seats.learn()
            if queued and self._running:
                is_special |= seats.make_room(planned_at) or seats.has_news
        cap = batch.cap(planned_at)
        num_preempted, tokens_left, num_idle = batch.schedule_running(planned_at, cap)
        if queued and not num_preempted:
            tokens_left = batch.admit_waiting(planned_at, tokens_left, cap)
        if seats and (queued or seats.starved):
            is_special |= seats.note_step(planned_at, has_token_budget=tokens_left > 0)
        num_decoding = self._decoding.num_calls - num_idle
        if self._is_async and self._num_steps and not num_decoding and not batch.chunks:
            # Nothing could be planned ahead: it is planned when the step before has ended.
            self._release()
            self._see()
            self._num_steps = 0
            self._begin(now)
            return
        steps = self._steps
        steps.start = now
        steps.first_s = first_s = self._step_s(num_decoding)
        if batch.chunks or num_preempted or num_idle or is_special:
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
        for _ in range(MAX_PUT_OFF):
            if ranking.put_off_from(head := waiting.head()) >= now:
                break
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

    # How long it takes.

    def _set_latency(self, latency: LatencyModel) -> None:
        self._fixed_s = latency.overhead_s + latency.weights_s
        self._below_s = latency.per_token_below_knee_s
        self._above_s = latency.per_token_s - latency.per_token_below_knee_s
        self._knee = latency.knee_tokens
        self._per_seq_s = latency.per_seq_s
        self._per_kv_token_s = latency.per_kv_token_s
        self._per_prefill_kv_token_s = latency.per_prefill_kv_token_s

    def _step_s(self, num_decoding: int) -> float:
        """Seconds of the step that begins; `LatencyModel.step_s` without its calls."""
        context = self._decoding.sum_base + num_decoding * (self._decoding.num_steps + 1)
        batch = self._batch
        if batch.idle_base:
            context -= batch.idle_base
            batch.idle_base = 0
        num_tokens = num_decoding
        attention = 0.0
        for call in batch.chunks:
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
            until, seats = self._ranking.put_off_from(self._waiting.head()), self._batch.seats
            if seats:
                until = min(until, seats.quiet_until(now))
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
