"""The brain of the router: predictions, policy and ledger behind three calls.

`submit` binds a call to an instance at once. A queue in front of the binding belongs here:
`submit` would then answer None and a `poll(now)` hand out the decisions when they fall.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

from vllm_workflow.core.config import PolicyConfig
from vllm_workflow.core.deadline import slack_s
from vllm_workflow.core.dispatch import build
from vllm_workflow.core.errors import NoInstanceError
from vllm_workflow.core.events import Added, Event, Marked, Record, Settled, Started, Submitted
from vllm_workflow.core.fleet import Fleet, Instance
from vllm_workflow.core.lengths import Lengths
from vllm_workflow.core.runs import Attained, AttainedService
from vllm_workflow.core.types import Decision, Outcome, StageRequest
from vllm_workflow.core.workflow import StageProfile, WorkflowProfile

_REST_KEPT_FOR = 32
"""Outcomes after which the rest of a run is predicted anew: it changes slowly, costs time."""

_MAX_TEXT_BYTES = 1 << 20
"""Bodies beyond this say nothing about tokens per byte."""

_MAX_RESTS = 1024
"""Predictions kept at most: the model in their key comes from clients."""


@dataclass(frozen=True, slots=True)
class _Sent:
    request: StageRequest
    decision: Decision
    num_prompt_bytes: int


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
        self._record: Record = record or _forget
        self._sent: dict[str, _Sent] = {}
        self._rests: dict[tuple[str, str, str], float] = {}
        self._attained = AttainedService()
        self._num_settled = 0
        self._record(Started(policy=config, fingerprint=config.fingerprint))
        for instance in fleet:
            self._record(Added(instance=instance))
            if not fleet.is_healthy(instance.instance_id):
                self._record(Marked(instance_id=instance.instance_id, healthy=False))
        for workflow in self._workflows.values():
            for stage in workflow.stages:
                self.lengths.declare(workflow.name, stage.name, stage.output_tokens)

    def add(self, instance: Instance) -> None:
        """Add or replace an instance; a new one counts as healthy."""
        self.fleet.add(instance)
        self._rests.clear()
        self._record(Added(instance=instance))

    def mark(self, instance_id: str, *, healthy: bool) -> None:
        """Note whether calls may be sent to an instance."""
        if self.fleet.is_healthy(instance_id) != healthy:
            self.fleet.mark(instance_id, healthy=healthy)
            self._rests.clear()
            self._record(Marked(instance_id=instance_id, healthy=healthy))

    def predict(
        self, request: StageRequest, *, num_prompt_bytes: int, max_tokens: int | None
    ) -> StageRequest:
        """Fill in what only this end knows: lengths, the rest of the run, what it has attained."""
        attained = self._attained.of(request)
        return replace(
            request,
            num_prompt_tokens=self.lengths.prompt_tokens(num_prompt_bytes),
            expected_output_tokens=self.lengths.output_tokens(
                request.workflow, request.stage, max_tokens
            ),
            rest_s=0.0 if request.final else self._rest_s(request),
            attained_s=attained.total_s,
            attained_path_s=attained.path_s,
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
    ) -> Decision:
        """Choose an instance and reserve it; `settle` must follow.

        Args:
            request: With its predictions filled in.
            now: Instant of the decision.
            num_prompt_bytes: Size of the prompt's text, to learn tokens per byte from.
            exclude: Instances that this call has already failed on.

        Raises:
            NoInstanceError: No healthy instance outside `exclude` serves the model.
            ValueError: The request is already in flight.
        """
        if request.request_id in self._sent:
            raise ValueError(f"request {request.request_id!r} is already in flight")
        candidates = self.fleet.candidates(request, exclude=exclude)
        if not candidates:
            raise NoInstanceError(self._why_none(request, exclude))
        costs = self._policy.costs(request, candidates)
        best = min(range(len(costs)), key=costs.__getitem__)
        chosen = candidates[best]
        decision = Decision(
            request_id=request.request_id,
            chosen=chosen,
            cost=costs[best],
            candidates=candidates,
            slack_s=slack_s(
                deadline=request.deadline,
                now=now,
                finish_s=chosen.finish_s,
                rest_s=request.rest_s,
            ),
            policy=self.config.dispatch,
        )
        self.fleet.reserve(request.request_id, chosen)
        self._sent[request.request_id] = _Sent(request, decision, num_prompt_bytes)
        self._attained.begin(request)
        self._record(
            Submitted(
                now=now,
                request=request,
                num_prompt_bytes=num_prompt_bytes,
                exclude=tuple(exclude),
                decision=decision,
            )
        )
        return decision

    def settle(self, outcome: Outcome) -> None:
        """Release a call's reservation, however it ended, and learn from it if it ended well.

        Safe to call twice: the second time does nothing.
        """
        sent = self._sent.pop(outcome.request_id, None)
        if sent is None:
            return
        self._record(Settled(outcome=outcome))
        self.fleet.release(outcome.request_id, sent.decision.chosen.instance_id)
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
        latency = next(i.latency for i in self.fleet if i.instance_id == instance_id)
        num_cached = outcome.num_cached_tokens or 0
        return self.fleet.drift(instance_id) * latency.prefill_s(
            outcome.num_prompt_tokens - num_cached, num_cached_tokens=num_cached
        )

    def _rest_s(self, request: StageRequest) -> float:
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
        tried = f"; tried {sorted(exclude)}" if exclude else ""
        return f"no healthy instance serves model {request.model!r}{tried}"


def _forget(event: Event) -> None:
    """Record nothing."""
