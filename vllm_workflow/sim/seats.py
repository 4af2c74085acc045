"""Taking a seat or KV blocks from a call with slack for one that has none.

The rules, their order and their limits are those of `engine/preemption.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

from vllm_workflow.core.config import PolicyConfig
from vllm_workflow.core.preemption import PreemptionCosts
from vllm_workflow.sim.live import LiveCall, WaitingLine
from vllm_workflow.sim.prefix_cache import BlockPool

_INF: Final = math.inf

MAX_PREEMPTIONS: Final = 3
MAX_CANDIDATES: Final = 8
MAX_VICTIMS: Final = 32
MAX_PRICED: Final = 4


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
        self._costs = PreemptionCosts(config.preempt_waste_s)
        self._prefill: tuple[float, int] | None = None
        self._ends: list[float] = []

    def note_prefill(self, duration_s: float, num_tokens: int) -> None:
        """Note a step that computed prompt tokens; it counts from `learn` on."""
        self._prefill = duration_s, num_tokens

    def note_departure(self, now: float) -> None:
        """Note the end of a call; it counts from `learn` on."""
        self._ends.append(now)

    @property
    def has_news(self) -> bool:
        """Whether something was noted that does not count yet."""
        return self._prefill is not None or bool(self._ends)

    def learn(self) -> None:
        """Let count what was noted."""
        if self._prefill is not None:
            self._costs.note_prefill(*self._prefill)
            self._prefill = None
        for end in self._ends:
            self._costs.note_departure(end)
        self._ends.clear()

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
                if not self._free_seat_for(call, now):
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
        until = _INF
        for call in self._waiting.first(MAX_CANDIDATES):
            if not call.is_urgent(now, urgent_slack_s):
                until = call.urgent_from(now, urgent_slack_s)
                break
            if self._victims(call, now, 1):
                return now  # what it loses and what waiting costs change from step to step
        for victim in self._running:
            if now < victim.protected_until < until:
                until = victim.protected_until
        return until

    def _free_seat_for(self, call: LiveCall, now: float) -> bool:
        num_lacking = self._num_lacking_blocks(call)
        for victim in self._victims(call, now, MAX_PRICED):
            num_own = self._num_own_blocks(victim) if num_lacking > 0 else 0
            cost_s = self._loss_s(victim, min(num_own, num_lacking))
            if self._costs.pays(cost_s, now) and self._costs.may_lose(victim.run_id, cost_s):
                self._take_from(victim, cost_s)
                return True
        return False

    def _free_blocks_for(self, call: LiveCall, now: float) -> None:
        num_lacking = self._num_lacking_blocks(call)
        losses: list[tuple[LiveCall, float]] = []
        loss_s = 0.0
        for victim in self._victims(call, now, MAX_CANDIDATES):
            if num_lacking <= 0:
                break
            num_own = self._num_own_blocks(victim)
            cost_s = self._loss_s(victim, min(num_own, num_lacking))
            if num_own > 0 and self._costs.may_lose(victim.run_id, cost_s):
                losses.append((victim, cost_s))
                loss_s += cost_s
                num_lacking -= num_own
        if num_lacking <= 0 and self._costs.pays(loss_s, now):
            for victim, cost_s in losses:
                self._take_from(victim, cost_s)

    def _num_lacking_blocks(self, call: LiveCall) -> int:
        return -(-call.prefill_end // self._pool.block_size) + 1 - self._pool.num_free

    def _num_own_blocks(self, victim: LiveCall) -> int:
        return self._pool.num_own_blocks(victim.table, self._num_computed(victim))

    def _loss_s(self, victim: LiveCall, num_lost_blocks: int) -> float:
        size, num_computed = self._pool.block_size, self._num_computed(victim)
        num_tokens = max(0, num_lost_blocks) * size + num_computed % size
        return self._costs.recompute_s(min(num_tokens, num_computed))

    def _take_from(self, victim: LiveCall, cost_s: float) -> None:
        self._preempt(victim)
        victim.num_seats_lost += 1
        self.num_preempted += 1
        self._costs.charge(victim.run_id, cost_s)

    def _victims(self, call: LiveCall, now: float, most: int) -> list[LiveCall]:
        """At most so many that can spare their seat, the one with most slack first."""
        config = self._config
        least = max(now + config.urgent_slack_s, call.latest_start + config.preempt_margin_s)
        victims: list[LiveCall] = []
        for victim in self._running[: -MAX_VICTIMS - 1 : -1]:
            if (
                victim.latest_start >= least
                and victim.key > call.key
                and victim.num_seats_lost < MAX_PREEMPTIONS
                and victim.protected_until <= now
            ):
                victims.append(victim)
                if len(victims) == most:
                    break
        return victims
