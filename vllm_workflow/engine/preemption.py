"""Taking a seat or KV blocks from a request with slack, for one that has none.

vLLM preempts only when a *running* request needs blocks. A waiting request, however urgent,
waits for a seat; ordering the queue alone does not help it. The rules here keep a preemption
from being in vain, or from being answered by the next one:

- only a request with a deadline and little slack preempts; one whose patience ran out does not;
- a victim is not urgent itself, has `preempt_margin_s` more slack, and ranks behind in the queue,
  so that it cannot take the seat that it just left;
- a victim that runs again is left alone for `preempt_cooldown_s`, and loses its seat at most
  `MAX_PREEMPTIONS` times in all: what it has computed is lost each time;
- for KV blocks, only after vLLM itself could not place the request in the step before.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from vllm.v1.request import RequestStatus

from vllm_workflow.core.config import PolicyConfig
from vllm_workflow.engine.calls import LiveCall, LiveCalls
from vllm_workflow.engine.clock import Clock
from vllm_workflow.engine.queue import OrderedRequestQueue
from vllm_workflow.engine.stats import EngineStats

MAX_PREEMPTIONS = 3
"""Times that one request may lose its seat to urgent ones."""
MAX_CANDIDATES = 8
"""Waiting requests looked at per step, and preemptions per step."""
MAX_VICTIMS = 32
"""Running requests looked at for one victim, from the one with most slack."""


class Preemption:
    """Makes room in one scheduler, between two of its steps."""

    def __init__(
        self,
        scheduler: Any,
        policy: PolicyConfig,
        calls: LiveCalls,
        stats: EngineStats,
        clock: Clock,
    ) -> None:
        self._scheduler = scheduler
        self._policy = policy
        self._calls = calls
        self._stats = stats
        self._clock = clock
        self._starved_id: str | None = None
        """The request at the head of the queue that got no KV blocks in the last step."""

    def make_room(self, now: float) -> None:
        """Preempt so that the urgent requests at the head of the queue fit into this step."""
        s = self._scheduler
        waiting: OrderedRequestQueue = s.waiting
        if not waiting or not s.running:
            return
        # Mostly the answer is no, and the head tells.
        if not self._is_urgent(self._calls.of(waiting.peek_request()), now):
            return
        num_seats_promised = 0
        for request in waiting.first(MAX_CANDIDATES):
            if not can_start(request):
                continue
            call = self._calls.of(request)
            if not self._is_urgent(call, now):
                break  # it is ahead of all others and would take what is made free for them
            if self._num_free_seats() <= num_seats_promised:
                if not self._preempt_for(call, now, cause="seat"):
                    break
            elif request.request_id == self._starved_id:
                self._free_blocks_for(request, call, now)
            num_seats_promised += 1

    def note_step(self, now: float, *, has_token_budget: bool) -> None:
        """Find out, after a step, whether the head of the queue was left out for KV blocks."""
        s = self._scheduler
        self._starved_id = None
        if not s.waiting or not has_token_budget or self._num_free_seats() <= 0:
            return
        head = s.waiting.peek_request()
        if can_start(head) and self._is_urgent(self._calls.of(head), now):
            self._starved_id = head.request_id

    def _free_blocks_for(self, request: Any, call: LiveCall, now: float) -> None:
        s = self._scheduler
        pool = s.kv_cache_manager.block_pool
        num_groups = max(1, len(s.kv_cache_config.kv_cache_groups))
        # An upper bound: a prefix in the cache needs less.
        num_needed = (-(-request.num_tokens // s.block_size) + 1) * num_groups
        num_needed += getattr(s.kv_cache_manager, "watermark_blocks", 0)
        num_lacking = num_needed - pool.get_num_free_blocks()
        if num_lacking > num_groups * self._num_blocks_to_gain(call, now):
            return  # all victims together would not do: none is preempted in vain
        for _ in range(MAX_CANDIDATES):
            if pool.get_num_free_blocks() >= num_needed:
                break
            if not self._preempt_for(call, now, cause="kv"):
                break

    def _num_blocks_to_gain(self, call: LiveCall, now: float) -> int:
        """Blocks per group that the possible victims hold; less comes free if some are shared."""
        s = self._scheduler
        victims = itertools.islice(self._victims(call, now), MAX_CANDIDATES)
        return sum(-(-s.running[index].num_computed_tokens // s.block_size) for index in victims)

    def _preempt_for(self, call: LiveCall, now: float, *, cause: str) -> bool:
        s = self._scheduler
        index = next(self._victims(call, now), None)
        if index is None:
            return False
        victim = s.running.pop(index)
        s._preempt_request(
            victim,
            self._clock.monotonic(),
            drop_stale_output=getattr(s, "requires_kv_delivery", False),
        )
        # Should it be resumed in this very step, the worker must take it for a new request.
        s.prev_step_scheduled_req_ids.discard(victim.request_id)
        self._calls.of(victim).num_preemptions += 1
        self._stats.preemptions[cause] += 1
        return True

    def _victims(self, call: LiveCall, now: float) -> Iterator[int]:
        """Places in `running` of those that can spare their seat, the one with most slack first."""
        running = self._scheduler.running
        monotonic = self._clock.monotonic()
        least = max(
            now + self._policy.urgent_slack_s, call.latest_start + self._policy.preempt_margin_s
        )
        for index in range(len(running) - 1, max(-1, len(running) - 1 - MAX_VICTIMS), -1):
            victim = self._calls.of(running[index])
            if (
                victim.latest_start >= least
                and victim.key > call.key
                and victim.num_preemptions < MAX_PREEMPTIONS
                and victim.protected_until <= monotonic
            ):
                yield index

    def _num_free_seats(self) -> int:
        s = self._scheduler
        num_seats = getattr(s, "max_num_active_reqs", s.max_num_running_reqs)
        return int(num_seats - len(s.running) - s.num_waiting_for_streaming_input)

    def _is_urgent(self, call: LiveCall, now: float) -> bool:
        return call.is_urgent(now, self._policy.urgent_slack_s)


def can_start(request: Any) -> bool:
    """Whether vLLM would run a waiting request now, room permitting."""
    return request.status in (RequestStatus.WAITING, RequestStatus.PREEMPTED) and (
        not request.num_stale_output_tokens or request.drop_stale_output
    )
