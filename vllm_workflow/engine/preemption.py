"""Taking a seat or KV blocks from a request with slack, for one that has none.

vLLM preempts only when a *running* request needs blocks. A waiting request, however urgent,
waits for a seat; ordering the queue alone does not help it. The rules here keep a preemption
from being in vain, or from being answered by the next one:

- only a request with a deadline and little slack preempts; one whose patience ran out does not;
- a victim is not urgent itself, has `preempt_margin_s` more slack, and ranks behind in the queue,
  so that it cannot take the seat that it just left;
- a victim that runs again is left alone for `preempt_cooldown_s`, and loses its seat at most
  `MAX_PREEMPTIONS` times in all;
- computing again what victims lose takes at most half as long as waiting for the next call to
  end, and at most `preempt_waste_s` for all calls of one run together, see `PreemptionCosts`.
  What the prefix cache will still hold is not lost: for a seat mostly all but a part of a block;
- for KV blocks, only after vLLM itself could not place the request in the step before.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vllm.v1.request import RequestStatus

from vllm_workflow.core.config import PolicyConfig
from vllm_workflow.core.preemption import PreemptionCosts
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
MAX_PRICED = 4
"""Of them, those whose loss is worked out."""


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
        self.costs = PreemptionCosts(policy.preempt_waste_s)
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
                if not self._free_seat_for(request, call, now):
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

    def _free_seat_for(self, request: Any, call: LiveCall, now: float) -> bool:
        num_lacking, monotonic = self._num_lacking_blocks(request), self._clock.monotonic()
        for _, victim in zip(range(MAX_PRICED), self._victims(call, now)):
            num_own = self._num_own_blocks(victim) if num_lacking > 0 else 0
            cost_s = self._loss_s(victim, min(num_own, num_lacking))
            if self.costs.pays(cost_s, monotonic) and self._may_lose(victim, cost_s):
                self._preempt(victim, cost_s, cause="seat")
                return True
        return False

    def _free_blocks_for(self, request: Any, call: LiveCall, now: float) -> None:
        """Preempt as many as it takes, or nobody: none loses its blocks in vain."""
        num_lacking = self._num_lacking_blocks(request)
        losses: list[tuple[Any, float]] = []
        for _, victim in zip(range(MAX_CANDIDATES), self._victims(call, now)):
            if num_lacking <= 0:
                break
            num_own = self._num_own_blocks(victim)
            cost_s = self._loss_s(victim, min(num_own, num_lacking))
            if num_own > 0 and self._may_lose(victim, cost_s):
                losses.append((victim, cost_s))
                num_lacking -= num_own
        cost_s = sum(cost_s for _, cost_s in losses)
        if num_lacking <= 0 and self.costs.pays(cost_s, self._clock.monotonic()):
            for victim, cost_s in losses:
                self._preempt(victim, cost_s, cause="kv")

    def _num_lacking_blocks(self, request: Any) -> int:
        """Blocks per group that a request would need beyond those that are free.

        An upper bound: a prefix in the cache needs less.
        """
        s = self._scheduler
        num_groups = max(1, len(s.kv_cache_config.kv_cache_groups))
        num_needed = (-(-request.num_tokens // s.block_size) + 1) * num_groups
        num_needed += getattr(s.kv_cache_manager, "watermark_blocks", 0)
        num_lacking = num_needed - s.kv_cache_manager.block_pool.get_num_free_blocks()
        return -(-num_lacking // num_groups)

    def _num_own_blocks(self, victim: Any) -> int:
        """Blocks of a running request that come free with it: no other holds them."""
        blocks = self._scheduler.kv_cache_manager.get_blocks(victim.request_id).blocks[0]
        return sum(block.ref_cnt == 1 for block in blocks)

    def _loss_s(self, victim: Any, num_lost_blocks: int) -> float:
        """Seconds of computing again: a last, partial block, and blocks that are taken at once."""
        s = self._scheduler
        num_computed = victim.num_computed_tokens
        if not s.kv_cache_manager.enable_caching:
            return self.costs.recompute_s(num_computed)
        num_tokens = max(0, num_lost_blocks) * s.block_size + num_computed % s.block_size
        return self.costs.recompute_s(min(num_tokens, num_computed))

    def _may_lose(self, victim: Any, cost_s: float) -> bool:
        return self.costs.may_lose(self._calls.of(victim).run_id, cost_s)

    def _preempt(self, victim: Any, cost_s: float, *, cause: str) -> None:
        s = self._scheduler
        s.running.remove(victim)
        s._preempt_request(
            victim,
            self._clock.monotonic(),
            drop_stale_output=getattr(s, "requires_kv_delivery", False),
        )
        # Should it be resumed in this very step, the worker must take it for a new request.
        s.prev_step_scheduled_req_ids.discard(victim.request_id)
        call = self._calls.of(victim)
        call.num_preemptions += 1
        self.costs.charge(call.run_id, cost_s)
        self._stats.preemptions[cause] += 1
        self._stats.recomputed_s += cost_s

    def _victims(self, call: LiveCall, now: float) -> Iterator[Any]:
        """Running requests that can spare their seat, the one with most slack first."""
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
                yield running[index]

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
