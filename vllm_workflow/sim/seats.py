"""Taking a seat or KV blocks from a call with slack for one that has none.

The rules, their order and their limits are those of `engine/preemption.py`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

from vllm_workflow.core.config import PolicyConfig
from vllm_workflow.sim.live import LiveCall, WaitingLine
from vllm_workflow.sim.prefix_cache import BlockPool

MAX_PREEMPTIONS = 3
MAX_CANDIDATES = 8
MAX_VICTIMS = 32


class SeatPreemption:
    """Makes room in one engine, between two of its steps.

    Args:
        config: Says who is urgent, and who can be made to wait.
        running: The engine's running calls, in order of latest start.
        waiting: Its waiting calls.
        pool: Its KV blocks.
        max_num_seqs: Its seats.
        preempt: Moves a call from `running` to `waiting`.
        num_computed: Tokens that a running call has computed.
    """

    def __init__(
        self,
        config: PolicyConfig,
        running: list[LiveCall],
        waiting: WaitingLine,
        pool: BlockPool,
        max_num_seqs: int,
        preempt: Callable[[LiveCall], None],
        num_computed: Callable[[LiveCall], int],
    ) -> None:
        self._config = config
        self._running = running
        self._waiting = waiting
        self._pool = pool
        self._max_num_seqs = max_num_seqs
        self._preempt = preempt
        self._num_computed = num_computed
        self.starved: LiveCall | None = None
        """The urgent head of the queue, if it got no KV blocks in the last step."""
        self.num_preempted = 0

    def make_room(self, now: float) -> bool:
        """Preempt so that the urgent calls at the head of the queue fit into this step.

        Returns:
            Whether any call lost its seat.
        """
        urgent_slack_s = self._config.urgent_slack_s
        if not self._waiting.head().is_urgent(now, urgent_slack_s):
            return False
        num_running = len(self._running)
        for num_promised, call in enumerate(self._waiting.first(MAX_CANDIDATES)):
            if not call.is_urgent(now, urgent_slack_s):
                break
            if self._max_num_seqs - len(self._running) <= num_promised:
                if not self._preempt_for(call, now):
                    break
            elif call is self.starved:
                self._free_blocks_for(call, now)
        return len(self._running) < num_running

    def note_step(self, now: float, *, has_token_budget: bool) -> bool:
        """Find out, after a step was made, whether the head was left out for KV blocks.

        Returns:
            Whether that is news.
        """
        before, self.starved = self.starved, None
        if self._waiting and has_token_budget and len(self._running) < self._max_num_seqs:
            head = self._waiting.head()
            if head.is_urgent(now, self._config.urgent_slack_s):
                self.starved = head
        return self.starved is not before

    def quiet_until(self, now: float) -> float:
        """Instant up to which `make_room` finds nothing to do, if it just found nothing and
        nothing happens but time passing."""
        urgent_slack_s = self._config.urgent_slack_s
        head = self._waiting.head()
        if not head.is_urgent(now, urgent_slack_s):
            return head.urgent_from(now, urgent_slack_s)
        until = math.inf
        for call in self._waiting.first(MAX_CANDIDATES):
            if not call.is_urgent(now, urgent_slack_s):
                until = call.urgent_from(now, urgent_slack_s)
                break
        for victim in self._running:
            if now < victim.protected_until < until:
                until = victim.protected_until
        return until

    def _free_blocks_for(self, call: LiveCall, now: float) -> None:
        pool = self._pool
        num_needed = -(-call.prefill_end // pool.block_size) + 1
        victims = itertools.islice(self._victims(call, now), MAX_CANDIDATES)
        num_to_gain = sum(-(-self._num_computed(v) // pool.block_size) for v in victims)
        if num_needed - pool.num_free > num_to_gain:
            return
        for _ in range(MAX_CANDIDATES):
            if pool.num_free >= num_needed or not self._preempt_for(call, now):
                break

    def _preempt_for(self, call: LiveCall, now: float) -> bool:
        victim = next(self._victims(call, now), None)
        if victim is None:
            return False
        self._preempt(victim)
        victim.num_seats_lost += 1
        self.num_preempted += 1
        return True

    def _victims(self, call: LiveCall, now: float) -> Iterator[LiveCall]:
        """Those that can spare their seat, the one with most slack first."""
        config = self._config
        least = max(now + config.urgent_slack_s, call.latest_start + config.preempt_margin_s)
        for victim in self._running[: -MAX_VICTIMS - 1 : -1]:
            if (
                victim.latest_start >= least
                and victim.key > call.key
                and victim.num_seats_lost < MAX_PREEMPTIONS
                and victim.protected_until <= now
            ):
                yield victim
