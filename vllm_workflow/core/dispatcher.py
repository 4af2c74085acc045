"""The brain of the router: predictions, policy and ledger behind three calls.

With `late_binding` a call that no instance can start now waits here, in the order of the
policy: `submit` answers None, and `poll(now)` hands out decisions as they fall, to be asked after
whatever may have made room. Without it `submit` always decides.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence

from vllm_workflow.core.admission import Demand
from vllm_workflow.core.backlog import Waiting
from vllm_workflow.core.call_events import Polled, Settled, Submitted, Withdrawn
from vllm_workflow.core.config import PolicyConfig
from vllm_workflow.core.deadline import slack_s
from vllm_workflow.core.dispatch import build
from vllm_workflow.core.errors import NoInstanceError
from vllm_workflow.core.events import Added, Apportioned, Marked, Record, Started, Swapped
from vllm_workflow.core.fleet import Fleet
from vllm_workflow.core.instances import Instances
from vllm_workflow.core.latency import shared_out
from vllm_workflow.core.pace import Pace
from vllm_workflow.core.predictor import Predictor, Sent
from vllm_workflow.core.tenant_ledger import TenantLedger
from vllm_workflow.core.tenant_room import TenantWaitingRoom
from vllm_workflow.core.tenants import TenantsConfig, promised
from vllm_workflow.core.types import Candidate, Decision, Outcome, StageRequest
from vllm_workflow.core.waiting_room import WaitingRoom
from vllm_workflow.core.workflow import WorkflowProfile


class Dispatcher(Instances):
    """Decides where calls go and learns from how they end.

    Args:
        fleet: The ledger. Change it through `add` and `mark`, or a replay will not know.
        config: The policy, until `swap`.
        workflows: Declared ones.
        record: Called with everything that a replay needs, in order.
        tenants: Their shares, quotas and SLOs; None: nobody asks whose a call is.
    """

    def __init__(
        self,
        fleet: Fleet,
        config: PolicyConfig,
        workflows: Iterable[WorkflowProfile] = (),
        record: Record | None = None,
        tenants: TenantsConfig | None = None,
    ) -> None:
        super().__init__(fleet, Predictor(fleet, workflows), record)
        self.config = config
        self.predictor.risk_quantile = config.risk_quantile
        self._policy = build(config)
        self.tenants = None if tenants is None else TenantLedger(tenants)
        self._paces: dict[str, Pace] = {}
        self._demands: dict[str, Demand] = {}
        self.waiting = self._waiting_room()
        self._due: dict[str, Decision] = {}
        self._sent: dict[str, Sent] = {}
        if record is not None:
            record(Started(policy=config, fingerprint=config.fingerprint, tenants=tenants))
            for instance in fleet:
                record(Added(instance=instance))
                if not fleet.is_healthy(instance.instance_id):
                    record(Marked(instance_id=instance.instance_id, healthy=False))

    def _waiting_room(self) -> WaitingRoom:
        learned = self._paces, self._demands
        if self.tenants is None:
            return WaitingRoom(self.fleet, self._policy, self.config, *learned)
        return TenantWaitingRoom(self.fleet, self._policy, self.config, self.tenants, *learned)

    def swap(self, config: PolicyConfig, *, now: float) -> None:
        """Let another policy decide from here on; `poll` should follow.

        What was learned and what is in flight stays. Calls that wait go on waiting, in the order
        of the new policy, even if under it none would have begun to.
        """
        if self._record is not None:
            self._record(Swapped(now=now, policy=config, fingerprint=config.fingerprint))
        waiting = self.waiting.by_arrival()
        self.config = config
        self.predictor.risk_quantile = config.risk_quantile
        self._policy = build(config)
        self.waiting = self._waiting_room()
        self.waiting.take_over(waiting, now)

    def apportion(self, tenants: TenantsConfig | None, *, now: float) -> None:
        """Let tenants have other shares, quotas and SLOs from here on; `poll` should follow.

        What each has used stays, and so do the deadlines that calls under way were promised.
        """
        if self._record is not None:
            self._record(Apportioned(now=now, tenants=tenants))
        waiting = self.waiting.by_arrival()
        if tenants is not None and self.tenants is not None:
            self.tenants.change(tenants, now)
        else:
            self.tenants = None if tenants is None else TenantLedger(tenants)
            if self.tenants is not None:
                self.tenants.take_over(
                    [
                        (sent.request, self._sent_work_s(sent), sent.time)
                        for sent in self._sent.values()
                    ],
                    [(held.request, self._work_s(held.request, ())) for held in waiting],
                )
        self.waiting = self._waiting_room()
        self.waiting.take_over(waiting, now)

    def declare(self, workflows: Iterable[WorkflowProfile]) -> None:
        """Take these for the declared workflows: what is predicted from here on is.

        A replay need not know: what was predicted of a call is in the log.
        """
        self.predictor.declare(workflows)

    def predict(
        self,
        request: StageRequest,
        *,
        num_prompt_bytes: int,
        max_tokens: int | None,
        head: Iterable[tuple[int, int]] = (),
    ) -> StageRequest:
        """Fill in what can only be predicted, see `Predictor.predict`, and the deadline that
        its tenant is promised if its run has none."""
        request = self.predictor.predict(
            request, num_prompt_bytes=num_prompt_bytes, max_tokens=max_tokens, head=head
        )
        if self.tenants is None or request.has_deadline:
            return request
        return promised(request, self.tenants.config.of(request.tenant_id), self.fleet)

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
            None with `late_binding` if no instance can start it now, and if a quota of its
            tenant holds it: a later `poll` decides, unless `withdraw` comes first.

        Raises:
            NoInstanceError: No healthy instance outside `exclude` serves the model.
            QuotaExceededError: Its tenant has no tokens for it before its deadline.
            ValueError: The request is already in flight or waiting, or has no prompt tokens.
        """
        if request.num_prompt_tokens < 1:
            raise ValueError(
                f"request {request.request_id!r}: num_prompt_tokens must be at least 1, "
                f"got {request.num_prompt_tokens}"
            )
        if request.request_id in self._sent:
            raise ValueError(f"request {request.request_id!r} is already in flight")
        excluded = tuple(exclude)
        if self.tenants is not None:
            request = request._replace(tenant_id=self.tenants.billed(request.tenant_id))
            self.tenants.require(request, now)
        decision: Decision | None
        if self.config.late_binding or self.tenants is not None:
            request, candidates = self._placed(request, now, excluded)
            waiting = self.waiting.enter(
                request, num_prompt_bytes, excluded, now, idle_s=self._idle_s(request, candidates)
            )
            if self.tenants is not None:
                self.tenants.entered(request, self._work_s(request, candidates))
            if waiting is not None or self.waiting.has_news:
                self._bind_waiting(now, waiting, candidates)
            decision = self._due.pop(request.request_id, None)
        else:
            # The others are what they are called: least of all, each in turn.
            shortlist = self.config.dispatch == "predicted-finish"
            candidates = self.fleet.candidates(
                request, now=now, exclude=excluded, shortlist=shortlist
            )
            if not candidates:
                raise NoInstanceError(self._why_none(request, excluded))
            costs = self._policy.costs(request, candidates)
            best = costs.index(min(costs))
            decision = self._bind(request, candidates, costs, best, now, num_prompt_bytes)
        self.predictor.began(request)
        if self._record is not None:
            self._record(Submitted(now, request, num_prompt_bytes, excluded, decision))
        return decision

    def _placed(
        self, request: StageRequest, now: float, exclude: tuple[str, ...]
    ) -> tuple[StageRequest, tuple[Candidate, ...]]:
        """Fill in what its place in the queue depends on, and return what was predicted for it."""
        fleet = self.fleet
        candidates: tuple[Candidate, ...] = ()
        # Where it will have to wait, what each instance would take is worked out later.
        if fleet.is_large or not fleet.has_room(request.model, exclude):
            alone_s = fleet.mean_alone_s(request, exclude)
        else:
            candidates = fleet.candidates(request, now=now, exclude=exclude)
            alone_s = None
            if candidates:
                alone_s = shared_out([candidate.alone_s for candidate in candidates])
        if alone_s is None:
            raise NoInstanceError(self._why_none(request, exclude))
        return fleet.renamed(request, alone_s), candidates

    def poll(self, now: float) -> list[Decision]:
        """Return the decisions on calls that waited, now that something may have changed.

        To be asked after each `submit`, `settle`, `withdraw`, `add` and `mark`, and at
        `waiting.held_until`.
        """
        looked = self.waiting.has_news or self.waiting.held_until <= now
        if looked:
            self._bind_waiting(now)
        decisions = list(self._due.values())
        if decisions:
            self._due.clear()
        if self._record is not None and (looked or decisions):
            self._record(Polled(now, tuple(decisions)))
        return decisions

    def withdraw(self, request_id: str, *, refused: bool = False) -> bool:
        """Give up a call that waits; returns whether it did.

        Args:
            request_id: Of the call.
            refused: See `Withdrawn`.
        """
        request = self.waiting.leave(request_id)
        if request is None:
            return False
        self.predictor.gave_up(request)
        if self.tenants is not None:
            self.tenants.left(request)
        if self._record is not None:
            self._record(Withdrawn(request_id, refused))
        return True

    def _bind_waiting(
        self,
        now: float,
        newest: Waiting | None = None,
        newest_candidates: tuple[Candidate, ...] = (),
    ) -> None:
        starting = self.waiting.starting(now, newest, newest_candidates)
        for choice in starting:
            waiting = choice.waiting
            self._due[waiting.request.request_id] = self._bind(
                waiting.request,
                choice.candidates,
                choice.costs,
                choice.chosen,
                now,
                waiting.num_prompt_bytes,
            )
            if self.tenants is not None:
                work_s = self.tenants.work_s(waiting.request.request_id)
                self.tenants.began(waiting.request, work_s, now)
                self.tenants.left(waiting.request)

    def _work_s(self, request: StageRequest, candidates: Sequence[Candidate]) -> float:
        """Service of a call alone, `shared_out`, whatever instances are busy with now."""
        drift = self.fleet.drift
        if candidates:
            return shared_out([c.alone_s / drift(c.instance_id) for c in candidates])
        drifts = [drift(i.instance_id) for i in self.fleet if i.serves(request.model)]
        return request.service_s * len(drifts) / sum(drifts) if drifts else request.service_s

    def _sent_work_s(self, sent: Sent) -> float:
        """The same of a call in flight, as far as the instance that it is on can tell."""
        chosen = sent.decision.chosen
        return chosen.alone_s / self.fleet.drift(chosen.instance_id)

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
        self._sent[request.request_id] = Sent(request, decision, num_prompt_bytes, now)
        return decision

    def settle(self, outcome: Outcome) -> None:
        """Release a call's reservation, however it ended, and learn from it if it ended well.

        Safe to call twice: the second time does nothing.
        """
        sent = self._sent.pop(outcome.request_id, None)
        if sent is None:
            return
        if self._record is not None:
            self._record(Settled(outcome))
        instance_id = sent.decision.chosen.instance_id
        # Without a first byte the prompt may never have been computed.
        ran = outcome.ok or not math.isnan(outcome.ttft_s)
        self.fleet.release(outcome.request_id, instance_id, ran=ran)
        alone_s = self.predictor.ended(sent, outcome)
        self.waiting.ended(
            sent.request,
            end_time=sent.time + outcome.e2el_s,
            idle_s=alone_s / self.fleet.drift(instance_id),
            ok=outcome.ok,
        )
        if self.tenants is not None:
            predicted_s = sent.decision.chosen.alone_s
            ratio = alone_s / predicted_s if predicted_s > 0.0 else 1.0
            self.tenants.ended(sent.request, outcome, ratio)
        self.fleet.forget(instance_id)

    def _idle_s(self, request: StageRequest, candidates: Sequence[Candidate]) -> float:
        """Service of a call on an idle fleet, by configured speeds, `shared_out`.

        What was learned of the speed of an instance is mostly how busy it is. It stays in where
        nothing was predicted for each instance.
        """
        if not self.config.relegate or not candidates:
            return request.service_s
        drift = self.fleet.drift
        return shared_out([c.alone_s / drift(c.instance_id) for c in candidates])

    @property
    def num_settled(self) -> int:
        """Calls that ended well and were learned from, ever."""
        return self.predictor.num_settled

    @property
    def num_in_flight(self) -> int:
        return len(self._sent)

    def _why_none(self, request: StageRequest, exclude: Collection[str]) -> str:
        if not self.fleet.serves(request.model):
            served = sorted({m for i in self.fleet for m in i.models})
            return f"no instance serves model {request.model!r}; served are {served}"
        tried = f"; tried {sorted(exclude)}" if exclude else ""
        return f"no healthy instance serves model {request.model!r}{tried}"
