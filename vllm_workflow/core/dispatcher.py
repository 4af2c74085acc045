"""The brain of the router: predictions, policy and ledger behind three calls.

With `late_binding` a call that no instance can start now waits here, in the order of the
policy: `submit` answers None, and `poll(now)` hands out decisions as they fall, to be asked after
whatever may have made room. Without it `submit` always decides.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

from vllm_workflow.core.backlog import Backlog, Waiting
from vllm_workflow.core.config import PolicyConfig
from vllm_workflow.core.deadline import is_hopeless, slack_s
from vllm_workflow.core.dispatch import build
from vllm_workflow.core.errors import NoInstanceError
from vllm_workflow.core.events import (
    Added,
    Marked,
    Polled,
    Record,
    Settled,
    Started,
    Submitted,
    Withdrawn,
)
from vllm_workflow.core.fleet import Fleet, Instance, max_stretch
from vllm_workflow.core.lengths import Lengths
from vllm_workflow.core.prefix import Segment
from vllm_workflow.core.remaining import RemainingTime
from vllm_workflow.core.runs import Attained, AttainedService
from vllm_workflow.core.types import Candidate, Decision, Outcome, StageRequest
from vllm_workflow.core.workflow import StageProfile, WorkflowProfile

_REST_KEPT_FOR = 32
"""Outcomes after which the rest of a run is predicted anew: it changes slowly, costs time."""

_MAX_TEXT_BYTES = 1 << 20
"""Bodies beyond this say nothing about tokens per byte."""

_MAX_LOOKED_AT = 16
"""Waiting calls that are considered when something has changed, from the first on."""

_MAX_RESTS = 1024
"""Predictions kept at most: the model in their key comes from clients."""


@dataclass(frozen=True, slots=True)
class _Sent:
    request: StageRequest
    decision: Decision
    num_prompt_bytes: int
    time: float
    """Instant at which it was bound."""


class Dispatcher:
    """Decides where calls go and learns from how they end.

    Args:
        fleet: The ledger. Change it through `add` and `mark`, or a replay will not know.
        config: The policy, fixed for the life of a dispatcher.
        workflows: Declared ones.
        record: Called with everything that a replay needs, in order.
    """

    def __init__(
        self,
        fleet: Fleet,
        config: PolicyConfig,
        workflows: Iterable[WorkflowProfile] = (),
        record: Record | None = None,
    ) -> None:
        self.fleet = fleet
        self.config = config
        self.lengths = Lengths()
        self._policy = build(config)
        self._workflows = {w.name: w for w in workflows}
        self._record = record
        self._ordering = config.build_ordering()
        self.backlog = Backlog()
        self.relegated = Backlog()
        """Calls of runs that can no longer be on time: they wait for all others."""
        self._num_since_relegated = 0
        self._remaining = RemainingTime()
        self._due: dict[str, Decision] = {}
        self._looked_at_version = -1
        self._sent: dict[str, _Sent] = {}
        self._rests: dict[tuple[str, str, str], float] = {}
        self._attained = AttainedService()
        self._num_settled = 0
        if record is not None:
            record(Started(policy=config, fingerprint=config.fingerprint))
            for instance in fleet:
                record(Added(instance=instance))
                if not fleet.is_healthy(instance.instance_id):
                    record(Marked(instance_id=instance.instance_id, healthy=False))
        for workflow in self._workflows.values():
            for stage in workflow.stages:
                self.lengths.declare(workflow.name, stage.name, stage.output_tokens)

    def add(self, instance: Instance) -> None:
        """Add or replace an instance; a new one counts as healthy."""
        self.fleet.add(instance)
        self._rests.clear()
        if self._record is not None:
            self._record(Added(instance=instance))

    def mark(self, instance_id: str, *, healthy: bool) -> None:
        """Note whether calls may be sent to an instance."""
        if self.fleet.is_healthy(instance_id) != healthy:
            self.fleet.mark(instance_id, healthy=healthy)
            self._rests.clear()
            if self._record is not None:
                self._record(Marked(instance_id=instance_id, healthy=healthy))

    def predict(
        self,
        request: StageRequest,
        *,
        num_prompt_bytes: int,
        max_tokens: int | None,
        head: Iterable[tuple[int, int]] = (),
    ) -> StageRequest:
        """Fill in what only this end knows: lengths, the rest of the run, what it has attained.

        Args:
            request: The call.
            num_prompt_bytes: Size of its prompt.
            max_tokens: The client's own bound on output tokens.
            head: `(chain hash, bytes)` of the pieces of the prompt that others may share.
        """
        attained = self._attained.of(request)
        return replace(
            request,
            num_prompt_tokens=self.lengths.prompt_tokens(num_prompt_bytes),
            expected_output_tokens=self.lengths.output_tokens(
                request.workflow, request.stage, max_tokens
            ),
            max_output_tokens=max_tokens,
            rest_s=0.0 if request.final else self._rest_s(request),
            attained_s=attained.total_s,
            attained_path_s=attained.path_s,
            prefix=tuple(
                Segment(chain_hash, self.lengths.prompt_tokens(num_bytes))
                for chain_hash, num_bytes in head
            ),
        )

    def attained(self, request: StageRequest) -> Attained:
        """Service that the run of a call has had by now."""
        return self._attained.of(request)

    def submit(
        self,
        request: StageRequest,
        *,
        now: float,
        num_prompt_bytes: int = 0,
        exclude: Collection[str] = (),
    ) -> Decision | None:
        """Choose an instance and reserve it, or let the call wait; `settle` must follow.

        Args:
            request: With its predictions filled in.
            now: Instant of the decision.
            num_prompt_bytes: Size of the prompt's text, to learn tokens per byte from.
            exclude: Instances that this call has already failed on.

        Returns:
            None with `late_binding` if no instance can start it now: a later `poll` decides,
            unless `withdraw` comes first.

        Raises:
            NoInstanceError: No healthy instance outside `exclude` serves the model.
            ValueError: The request is already in flight or waiting.
        """
        if request.request_id in self._sent:
            raise ValueError(f"request {request.request_id!r} is already in flight")
        excluded = tuple(exclude)
        candidates = self.fleet.candidates(request, now=now, exclude=excluded)
        if not candidates:
            raise NoInstanceError(self._why_none(request, excluded))
        decision: Decision | None
        if self.config.late_binding:
            alone_s = sum(c.alone_s for c in candidates) / len(candidates)
            request = replace(request, service_s=alone_s)
            key = self._ordering.key(request)
            waiting = self._enqueue(request, key, num_prompt_bytes, excluded, now)
            self._bind_waiting(now, newest=waiting)
            decision = self._due.pop(request.request_id, None)
        else:
            costs = self._policy.costs(request, candidates)
            best = min(range(len(costs)), key=costs.__getitem__)
            decision = self._bind(request, candidates, costs, best, now, num_prompt_bytes)
        self._attained.begin(request)
        self._remaining.began(request)
        if self._record is not None:
            self._record(
                Submitted(
                    now=now,
                    request=request,
                    num_prompt_bytes=num_prompt_bytes,
                    exclude=excluded,
                    decision=decision,
                )
            )
        return decision

    def poll(self, now: float) -> list[Decision]:
        """Return the decisions on calls that waited, now that something may have changed.

        To be asked after each `submit`, `settle`, `withdraw`, `add` and `mark`.
        """
        looked = self.num_waiting > 0 and self.fleet.version != self._looked_at_version
        if looked:
            self._bind_waiting(now)
        decisions = tuple(self._due.values())
        self._due.clear()
        if self._record is not None and (looked or decisions):
            self._record(Polled(now=now, decisions=decisions))
        return list(decisions)

    def withdraw(self, request_id: str) -> bool:
        """Give up a call that waits; returns whether it did."""
        waiting = self.backlog.remove(request_id) or self.relegated.remove(request_id)
        if waiting is None:
            return False
        self._remaining.ended(waiting.request, end_time=math.nan, alone_s=math.nan, ok=False)
        if self._record is not None:
            self._record(Withdrawn(request_id=request_id))
        return True

    @property
    def num_waiting(self) -> int:
        """Calls that no instance has been chosen for yet."""
        return len(self.backlog) + len(self.relegated)

    def _enqueue(
        self,
        request: StageRequest,
        key: float,
        num_prompt_bytes: int,
        exclude: tuple[str, ...],
        now: float,
    ) -> Waiting:
        if self.config.relegate and is_hopeless(request, now, self.config.relegation_margin):
            return self.relegated.add(request, request.deadline, num_prompt_bytes, exclude)
        level = 0 if self.config.relegate and request.attained_s > 0.0 else 1
        return self.backlog.add(request, key, num_prompt_bytes, exclude, level=level)

    def _relegate(self, now: float) -> None:
        """Move what can no longer be on time behind all that can."""
        for waiting in self.backlog.first(_MAX_LOOKED_AT):
            if is_hopeless(waiting.request, now, self.config.relegation_margin):
                request = waiting.request
                self.backlog.remove(request.request_id)
                self.relegated.add(
                    request, request.deadline, waiting.num_prompt_bytes, waiting.exclude
                )

    def _in_turn(self, now: float) -> list[Waiting]:
        """Calls to look at, in order; now and then a relegated one goes first, so none starves."""
        if self.config.relegate:
            self._relegate(now)
        if not self.relegated:
            return self.backlog.first(_MAX_LOOKED_AT)
        hopeful = self.backlog.first(_MAX_LOOKED_AT)
        hopeless = self.relegated.first(_MAX_LOOKED_AT)
        if self._num_since_relegated >= 1.0 / self.config.relegated_share - 1.0:
            return [*hopeless[:1], *hopeful, *hopeless[1:]]
        return hopeful + hopeless

    def _bind_waiting(self, now: float, newest: Waiting | None = None) -> None:
        """Bind what can start now, first in order first.

        A call that cannot start holds up those behind it in one way: the instance that it is
        going to start on takes no call that would still be there by then.

        Args:
            now: Instant.
            newest: A call that has just come. If nothing else has changed since all were looked
                at, no other can start.
        """
        fleet = self.fleet
        only_newest = newest is not None and fleet.version == self._looked_at_version
        head: Waiting | None = None
        head_wait: tuple[str, float] | None = None
        for waiting in self._in_turn(now):
            if not fleet.has_room():
                break
            if (only_newest and waiting is not newest) or not fleet.can_start(
                waiting.request, waiting.exclude
            ):
                head = head or waiting
                continue
            candidates = fleet.candidates(waiting.request, now=now, exclude=waiting.exclude)
            if head is not None and head_wait is None:
                head_wait = self._wait_of(head, now)
            costs = self._policy.costs(waiting.request, candidates)
            able = _able(candidates, head_wait)
            if self.config.relegate and self._is_guest(waiting):
                able = [i for i in able if self._bears(waiting, candidates[i], now)]
            chosen = min(able, key=costs.__getitem__, default=None)
            if chosen is None:
                head = head or waiting
                continue
            request = waiting.request
            self._num_since_relegated += 1
            if self.backlog.remove(request.request_id) is None:
                self.relegated.remove(request.request_id)
                self._num_since_relegated = 0
            self._due[request.request_id] = self._bind(
                request, candidates, costs, chosen, now, waiting.num_prompt_bytes
            )
        self._looked_at_version = fleet.version

    def _is_guest(self, waiting: Waiting) -> bool:
        """Whether a call's run has not begun, or is late anyway."""
        return waiting.request.attained_s <= 0.0 or waiting.request.request_id in self.relegated

    def _bears(self, waiting: Waiting, candidate: Candidate, now: float) -> bool:
        """Whether such a call may join others on an instance without making them late."""
        margin = self.config.relegation_margin
        if not self.fleet.bears(candidate, margin=margin):
            return False
        own = max_stretch(waiting.request, candidate, now)
        return candidate.stretch * (1.0 + margin) <= own

    def _wait_of(self, waiting: Waiting, now: float) -> tuple[str, float] | None:
        """Instance that can start a call first, and in how many seconds."""
        candidates = self.fleet.candidates(waiting.request, now=now, exclude=waiting.exclude)
        first = min(candidates, key=lambda c: c.queue_s, default=None)
        return None if first is None else (first.instance_id, first.queue_s)

    def _bind(
        self,
        request: StageRequest,
        candidates: tuple[Candidate, ...],
        costs: Sequence[float],
        index: int,
        now: float,
        num_prompt_bytes: int,
    ) -> Decision:
        chosen = candidates[index]
        decision = Decision(
            request_id=request.request_id,
            chosen=chosen,
            cost=costs[index],
            candidates=candidates,
            slack_s=slack_s(
                deadline=request.deadline,
                now=now,
                finish_s=chosen.finish_s,
                rest_s=request.rest_s,
            ),
            policy=self.config.dispatch,
        )
        self.fleet.reserve(request.request_id, chosen, now=now, request=request)
        self._sent[request.request_id] = _Sent(request, decision, num_prompt_bytes, now)
        return decision

    def settle(self, outcome: Outcome) -> None:
        """Release a call's reservation, however it ended, and learn from it if it ended well.

        Safe to call twice: the second time does nothing.
        """
        sent = self._sent.pop(outcome.request_id, None)
        if sent is None:
            return
        if self._record is not None:
            self._record(Settled(outcome=outcome))
        instance_id = sent.decision.chosen.instance_id
        # Without a first byte the prompt may never have been computed.
        ran = outcome.ok or not math.isnan(outcome.ttft_s)
        self.fleet.release(outcome.request_id, instance_id, ran=ran)
        if outcome.num_cached_tokens is not None:
            self.fleet.observe_cached(
                instance_id,
                predicted=sent.decision.chosen.num_cached_tokens,
                actual=outcome.num_cached_tokens,
            )
        self._remaining.ended(
            sent.request,
            end_time=sent.time + outcome.e2el_s,
            alone_s=self._alone_s(sent, outcome),
            ok=outcome.ok,
        )
        if outcome.ok:
            self._learn(sent, outcome)

    @property
    def num_in_flight(self) -> int:
        return len(self._sent)

    def _learn(self, sent: _Sent, outcome: Outcome) -> None:
        request, chosen = sent.request, sent.decision.chosen
        decode_s = chosen.decode_s
        if outcome.num_output_tokens is not None and request.expected_output_tokens > 1.0:
            num_decoded = max(0, outcome.num_output_tokens - 1)
            decode_s *= num_decoded / (request.expected_output_tokens - 1.0)
        self.fleet.observe(
            chosen.instance_id,
            predicted_s=chosen.queue_s + chosen.prefill_s + decode_s,
            actual_s=outcome.e2el_s,
        )
        if request.workflow_id:
            self._attained.end(request, self._prefill_s(sent, outcome) + decode_s)
        tokens_per_byte = None
        # Larger bodies are mostly images, whose bytes are not text.
        if outcome.num_prompt_tokens and 0 < sent.num_prompt_bytes <= _MAX_TEXT_BYTES:
            tokens_per_byte = outcome.num_prompt_tokens / sent.num_prompt_bytes
        self.lengths.observe(
            request.workflow,
            request.stage,
            output_tokens=outcome.num_output_tokens,
            tokens_per_byte=tokens_per_byte,
        )
        self._num_settled += 1
        if self._num_settled % _REST_KEPT_FOR == 0:
            self._rests.clear()

    def _prefill_s(self, sent: _Sent, outcome: Outcome) -> float:
        """Prefill of the prompt tokens that were computed, on the instance that did.

        What a run has attained is priced by the latency model, for the tokens that its calls
        turned out to have: measured durations contain the time spent waiting.
        """
        if outcome.num_prompt_tokens is None:
            return sent.decision.chosen.prefill_s
        instance_id = sent.decision.chosen.instance_id
        latency = self.fleet.instance(instance_id).latency
        num_cached = outcome.num_cached_tokens or 0
        return self.fleet.drift(instance_id) * latency.prefill_s(
            outcome.num_prompt_tokens - num_cached, num_cached_tokens=num_cached
        )

    def _alone_s(self, sent: _Sent, outcome: Outcome) -> float:
        """Service of the tokens that a call turned out to have, on its instance left to itself."""
        chosen, request = sent.decision.chosen, sent.request
        decode_s = chosen.decode_s / chosen.stretch
        if outcome.num_output_tokens is not None and request.expected_output_tokens > 1.0:
            num_decoded = max(0, outcome.num_output_tokens - 1)
            decode_s *= num_decoded / (request.expected_output_tokens - 1.0)
        return self._prefill_s(sent, outcome) + decode_s

    def _rest_s(self, request: StageRequest) -> float:
        """What was learned from runs, else what was declared, else nothing."""
        learned_s = self._remaining.after(request)
        if learned_s is not None:
            return learned_s
        workflow = self._workflows.get(request.workflow)
        if workflow is None:
            return 0.0
        after = workflow.after(request.stage)
        if not after:
            return 0.0
        key = (request.workflow, request.stage, request.model)
        rest_s = self._rests.get(key)
        if rest_s is None:
            if len(self._rests) >= _MAX_RESTS:
                self._rests.clear()
            rest_s = self._rests[key] = self._predict_rest_s(workflow, after, request.model)
        return rest_s

    def _predict_rest_s(
        self, workflow: WorkflowProfile, after: Iterable[StageProfile], model: str
    ) -> float:
        return sum(
            stage.rounds
            * self.fleet.mean_service_s(
                model,
                stage.prompt_tokens,
                self.lengths.output_tokens(workflow.name, stage.name),
            )
            for stage in after
        )

    def _why_none(self, request: StageRequest, exclude: Collection[str]) -> str:
        if not self.fleet.serves(request.model):
            served = sorted({m for i in self.fleet for m in i.models})
            return f"no instance serves model {request.model!r}; served are {served}"
        most = max(
            (i.num_kv_tokens or math.inf for i in self.fleet if i.serves(request.model)), default=0
        )
        if request.num_tokens_at_most > most:
            return (
                f"expected at most {most} tokens of prompt and answer, which is what the largest "
                f"KV cache holds, got {request.num_tokens_at_most}"
            )
        tried = f"; tried {sorted(exclude)}" if exclude else ""
        return f"no healthy instance serves model {request.model!r}{tried}"


def _able(candidates: Sequence[Candidate], head_wait: tuple[str, float] | None) -> list[int]:
    """Indexes of the candidates that a call could start on now.

    A call does not wait for a faster instance while a slower one could start it: that pays for
    the call, and costs the fleet a quarter of its throughput when many do it.

    Args:
        candidates: Predictions; those with no `queue_s` can start it.
        head_wait: Instance that a call which goes first waits for, and how long: what would
            still be there by then is not started there.
    """
    return [
        index
        for index, candidate in enumerate(candidates)
        if candidate.queue_s <= 0.0
        and (
            head_wait is None
            or head_wait[0] != candidate.instance_id
            or candidate.finish_s <= head_wait[1]
        )
    ]
