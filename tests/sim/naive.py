"""The level 1 engine written as plainly as can be: step by step, block by block.

Follows vLLM's scheduler and block pool, and the plug-in's pre-pass; shares no code with them
but the values, and with `sim/` but the types.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from vllm_workflow.core.config import PolicyConfig
from vllm_workflow.core.latency import LatencyModel, prefill_attention
from vllm_workflow.core.preemption import PreemptionCosts
from vllm_workflow.sim.types import EngineEvent, EngineRequest, EventKind


class NaivePool:
    """Blocks are integers; a free one sits in `queue`, first to be reused first."""

    def __init__(self, num_blocks: int) -> None:
        self.queue = list(range(num_blocks))
        self.hash_of: dict[int, tuple[object, ...]] = {}
        self.blocks_of: dict[tuple[object, ...], list[int]] = {}
        self.refs = [0] * num_blocks

    def cached(self, hashes: list[tuple[object, ...]], most: int) -> list[int]:
        found = []
        for h in hashes[:most]:
            if not self.blocks_of.get(h):
                break
            found.append(self.blocks_of[h][0])
        return found

    def touch(self, blocks: list[int]) -> None:
        for b in blocks:
            if self.refs[b] == 0:
                self.queue.remove(b)
            self.refs[b] += 1

    def take(self, n: int) -> list[int]:
        assert n <= len(self.queue)
        taken, self.queue = self.queue[:n], self.queue[n:]
        for b in taken:
            h = self.hash_of.pop(b, None)
            if h is not None:
                self.blocks_of[h].remove(b)
            self.refs[b] = 1
        return taken

    def label(self, block: int, h: tuple[object, ...]) -> None:
        if block not in self.hash_of:
            self.hash_of[block] = h
            self.blocks_of.setdefault(h, []).append(block)

    def free(self, blocks: list[int]) -> None:
        first, last = [], []
        for b in reversed(blocks):
            self.refs[b] -= 1
            if self.refs[b] == 0:
                (last if b in self.hash_of else first).append(b)
        self.queue = first + self.queue + last


@dataclass(eq=False)
class NaiveCall:
    request: EngineRequest
    tokens: list[tuple[object, ...]]
    """What each token of the prompt depends on: its part and its place in it."""
    key: float
    latest_start: float
    place: tuple[int, int] = (0, 0)
    generated: int = 0
    computed: int = 0
    chunk: int = 0
    blocks: list[int] = field(default_factory=list)
    cached: int = -1
    preemptions: int = 0
    seats_lost: int = 0
    protected_until: float = -math.inf
    aborted: bool = False
    put_off: bool = False

    @property
    def id(self) -> str:
        return self.request.request.request_id

    @property
    def num_tokens(self) -> int:
        return self.request.num_prompt_tokens + self.generated

    def hashes(self, size: int) -> list[tuple[object, ...]]:
        """Of every full block of what it has; its last token says what came before."""
        own = [*self.tokens, *(("out", self.id, i) for i in range(self.generated))]
        return own[size - 1 :: size]

    @property
    def run(self) -> str:
        return self.request.request.workflow_id or self.id

    def is_late(self, now: float) -> bool:
        deadline = self.request.request.deadline
        if self.cached >= 0:
            return deadline < now
        return deadline < math.inf and self.latest_start < now

    def is_urgent(self, now: float, slack_s: float) -> bool:
        deadline = self.request.request.deadline
        return now < deadline < math.inf and self.latest_start - now < slack_s


class NaiveEngine:
    def __init__(
        self,
        latency: LatencyModel,
        config: PolicyConfig,
        *,
        max_num_seqs: int,
        num_kv_blocks: int,
        block_size: int,
    ) -> None:
        self.instance_id = "naive"
        self.latency, self.config, self.size = latency, config, block_size
        self.seats = max_num_seqs
        self.pool = NaivePool(num_kv_blocks - 1)
        self.ordering = config.build_ordering()
        self.reorders = config.preempt or config.ordering != "fcfs"
        self.waiting: list[NaiveCall] = []
        self.running: list[NaiveCall] = []
        self.scheduled: list[NaiveCall] = []
        self.starved: NaiveCall | None = None
        self.end, self.back, self.front = math.inf, 0, 0
        self.is_stepping = False
        self.num_steps = 0
        self.num_idle_steps = 0
        self.costs = PreemptionCosts(config.preempt_waste_s)
        self.started = 0.0

    def submit(self, request: EngineRequest, now: float) -> None:
        told = request.request
        deadline = told.deadline
        if deadline == math.inf:
            deadline = told.arrival_time + self.config.patience_s
        tokens: list[tuple[object, ...]] = []
        above: tuple[object, ...] = ()
        for part in request.prefix:
            above = (*above, part.part_id, part.num_tokens)
            tokens += [("part", above, i) for i in range(part.num_tokens)]
        tokens += [
            ("own", told.request_id, i) for i in range(request.num_prompt_tokens - len(tokens))
        ]
        call = NaiveCall(
            request,
            tokens,
            self.ordering.key(told),
            deadline - told.rest_s - told.service_s,
        )
        self.back += 1
        call.place = (1, self.back)
        self.waiting.append(call)
        if self.end == math.inf:
            self.end = now

    def abort(self, request_id: str, now: float) -> None:
        self.waiting = [c for c in self.waiting if c.id != request_id]
        for call in self.running:
            if call.id == request_id:
                call.aborted = True

    def next_event_time(self) -> float:
        return self.end

    def advance(self, now: float) -> list[EngineEvent]:
        events: list[EngineEvent] = []
        while self.end <= now:
            at = self.end
            if self.is_stepping:
                self.finish_step(at, events)
            self.start_step(at)
        return events

    def finish_step(self, now: float, events: list[EngineEvent]) -> None:
        num_prefill_tokens = sum(c.chunk for c in self.scheduled) - len(self.scheduled)
        self.costs.note_prefill(now - self.started, num_prefill_tokens)
        for call in list(self.running):
            ended = False
            if call in self.scheduled:
                call.computed += call.chunk
                if call.computed == call.num_tokens and not call.aborted:
                    if not call.generated:
                        events.append(self.event(call, now, EventKind.FIRST_TOKEN))
                    call.generated += 1
                    ended = call.generated == call.request.num_output_tokens
                    if ended:
                        self.costs.note_departure(now)
                        events.append(self.event(call, now, EventKind.FINISHED))
            call.chunk = 0
            if call.aborted and not ended:
                self.leave(call)
        for call in list(self.running):
            if call.generated == call.request.num_output_tokens:
                self.leave(call)

    def leave(self, call: NaiveCall) -> None:
        self.running.remove(call)
        self.pool.free(call.blocks)

    def event(self, call: NaiveCall, now: float, kind: EventKind) -> EngineEvent:
        return EngineEvent(
            time=now,
            request_id=call.id,
            kind=kind,
            num_cached_tokens=call.cached,
            num_preemptions=call.preemptions,
        )

    def queue(self) -> list[NaiveCall]:
        return sorted(self.waiting, key=lambda c: (c.key, c.place))

    def preempt(self, call: NaiveCall) -> None:
        self.running.remove(call)
        self.pool.free(call.blocks)
        call.blocks, call.computed = [], 0
        call.preemptions += 1
        self.front -= 1
        call.place = (0, self.front)
        self.waiting.append(call)

    def give(self, call: NaiveCall, num_tokens: int) -> bool:
        """Blocks for the next `num_tokens` tokens, if there are any."""
        end = call.computed + num_tokens
        needed = -(-end // self.size) - len(call.blocks)
        if needed > len(self.pool.queue):
            return False
        call.blocks += self.pool.take(needed)
        for block, h in zip(call.blocks[: end // self.size], call.hashes(self.size)):
            self.pool.label(block, h)
        call.chunk = num_tokens
        self.scheduled.append(call)
        return True

    def start_step(self, now: float) -> None:
        self.scheduled = []
        if not self.running and not self.waiting:
            self.end, self.is_stepping = math.inf, False
            return
        config = self.config
        if self.reorders:
            self.running.sort(key=lambda c: c.latest_start if config.preempt else c.key)
        if config.ordering == "slack" and config.late_patience_s:
            for _ in range(64):
                if not self.waiting or not self.queue()[0].is_late(now) or self.queue()[0].put_off:
                    break
                head = self.queue()[0]
                head.put_off = True
                head.key += config.late_patience_s
                head.latest_start += config.late_patience_s
        if config.preempt and self.waiting and self.running:
            self.make_room(now)
        urgent = [
            c.is_urgent(now, config.urgent_slack_s) for c in self.running[:1] + self.queue()[:1]
        ]
        cap = config.prefill_chunk_cap if self.reorders and any(urgent) else 0
        budget, preempted = int(self.latency.max_num_batched_tokens), False
        index = 0
        while index < len(self.running) and budget > 0:
            call = self.running[index]
            num_tokens = self.capped(call, min(call.num_tokens - call.computed, budget), now, cap)
            while not self.give(call, num_tokens):
                victim = self.running[-1]
                self.preempt(victim)
                preempted = True
                if victim is call:
                    break
            if call not in self.running:
                break
            budget -= num_tokens
            index += 1
        while not preempted and self.waiting and budget > 0 and len(self.running) < self.seats:
            num_tokens = self.admit(self.queue()[0], budget, now, cap)
            if not num_tokens:
                break
            budget -= num_tokens
        self.starved = None
        if config.preempt and self.waiting and budget > 0 and len(self.running) < self.seats:
            head = self.queue()[0]
            self.starved = head if head.is_urgent(now, config.urgent_slack_s) else None
        self.num_steps += 1
        self.is_stepping = True
        self.started = now
        self.end = now + self.step_s()

    def capped(self, call: NaiveCall, num_tokens: int, now: float, cap: int) -> int:
        if 0 < cap < num_tokens and not call.is_urgent(now, self.config.urgent_slack_s):
            return cap
        return num_tokens

    def admit(self, call: NaiveCall, budget: int, now: float, cap: int) -> int:
        hits = self.pool.cached(call.hashes(self.size), (call.num_tokens - 1) // self.size)
        num_free_hits = sum(self.pool.refs[b] == 0 for b in hits)
        needed = -(-call.num_tokens // self.size) - len(hits) + num_free_hits
        if needed > len(self.pool.queue):
            return 0
        self.waiting.remove(call)
        self.pool.touch(hits)
        call.blocks = list(hits)
        call.computed = len(hits) * self.size
        num_tokens = self.capped(call, min(call.num_tokens - call.computed, budget), now, cap)
        assert self.give(call, num_tokens)
        if call.cached >= 0:
            call.protected_until = now + self.config.preempt_cooldown_s
        else:
            call.cached = call.computed
        self.running.append(call)
        return num_tokens

    def step_s(self) -> float:
        decodes = [
            c for c in self.scheduled if c.chunk == 1 and c.computed >= c.request.num_prompt_tokens
        ]
        prefills = [c for c in self.scheduled if c not in decodes]
        return self.latency.step_s(
            num_prefill_tokens=sum(c.chunk for c in prefills),
            num_decode_seqs=len(decodes),
            num_kv_tokens=sum(c.computed + 1 for c in decodes),
            prefill_attention=sum(prefill_attention(c.chunk, c.computed) for c in prefills),
        )

    def victims(self, call: NaiveCall, now: float) -> list[NaiveCall]:
        least = max(
            now + self.config.urgent_slack_s, call.latest_start + self.config.preempt_margin_s
        )
        return [
            v
            for v in list(reversed(self.running))[:32]
            if v.latest_start >= least
            and v.key > call.key
            and v.seats_lost < 3
            and v.protected_until <= now
        ]

    def make_room(self, now: float) -> None:
        for promised, call in enumerate(self.queue()[:8]):
            if not call.is_urgent(now, self.config.urgent_slack_s):
                return
            if self.seats - len(self.running) <= promised:
                if not self.take_seat(call, now):
                    return
            elif call is self.starved:
                self.take_blocks(call, now)

    def take_seat(self, call: NaiveCall, now: float) -> bool:
        for victim in self.victims(call, now)[:4]:
            cost_s = self.loss_s(victim, min(self.own(victim), self.lacking(call)))
            if self.costs.pays(cost_s, now) and self.costs.may_lose(victim.run, cost_s):
                self.take_from(victim, cost_s)
                return True
        return False

    def take_blocks(self, call: NaiveCall, now: float) -> None:
        lacking, losses = self.lacking(call), []
        for victim in self.victims(call, now)[:8]:
            if lacking <= 0:
                break
            cost_s = self.loss_s(victim, min(self.own(victim), lacking))
            if self.own(victim) and self.costs.may_lose(victim.run, cost_s):
                losses.append((victim, cost_s))
                lacking -= self.own(victim)
        if lacking <= 0 and self.costs.pays(sum(cost_s for _, cost_s in losses), now):
            for victim, cost_s in losses:
                self.take_from(victim, cost_s)

    def lacking(self, call: NaiveCall) -> int:
        return -(-call.num_tokens // self.size) + 1 - len(self.pool.queue)

    def own(self, call: NaiveCall) -> int:
        return sum(self.pool.refs[b] == 1 for b in call.blocks)

    def loss_s(self, victim: NaiveCall, num_blocks: int) -> float:
        num_tokens = max(0, num_blocks) * self.size + victim.computed % self.size
        return self.costs.recompute_s(min(num_tokens, victim.computed))

    def take_from(self, victim: NaiveCall, cost_s: float) -> None:
        self.preempt(victim)
        victim.seats_lost += 1
        self.costs.charge(victim.run, cost_s)
