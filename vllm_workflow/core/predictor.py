"""What is predicted of a call before it is sent, and learned when it has ended."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

from vllm_workflow.core.fleet import Fleet
from vllm_workflow.core.lengths import Lengths
from vllm_workflow.core.prefix import Segment
from vllm_workflow.core.remaining import RemainingTime
from vllm_workflow.core.runs import Attained, AttainedService
from vllm_workflow.core.types import Decision, Outcome, StageRequest
from vllm_workflow.core.workflow import StageProfile, WorkflowProfile

_REST_KEPT_FOR = 32
"""Outcomes after which the rest of a run is predicted anew: it changes slowly, costs time."""

_MAX_TEXT_BYTES = 1 << 20
"""Bodies beyond this say nothing about tokens per byte."""

_MAX_RESTS = 1024
"""Predictions kept at most: the model in their key comes from clients."""


class Sent(NamedTuple):
    """A call on its way."""

    request: StageRequest
    decision: Decision
    num_prompt_bytes: int
    time: float
    """Instant at which it was bound."""


class Predictor:
    """Lengths, what runs have attained, and how long they go on: learned from outcomes.

    Args:
        fleet: Prices tokens in seconds, and is told how fast instances turn out to be.
        workflows: Declared ones, believed until enough runs were seen.
    """

    def __init__(self, fleet: Fleet, workflows: Iterable[WorkflowProfile] = ()) -> None:
        self.lengths = Lengths()
        self._fleet = fleet
        self._workflows = {w.name: w for w in workflows}
        self._remaining = RemainingTime()
        self._rests: dict[tuple[str, str, str], float] = {}
        self._attained = AttainedService()
        self._num_settled = 0
        for workflow in self._workflows.values():
            for stage in workflow.stages:
                self.lengths.declare(workflow.name, stage.name, stage.output_tokens)

    def fleet_changed(self) -> None:
        """Forget what was computed for the fleet as it was."""
        self._rests.clear()

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
        return request._replace(
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

    def began(self, request: StageRequest) -> None:
        """Note that a call has been made."""
        self._attained.begin(request)
        self._remaining.began(request)

    def gave_up(self, request: StageRequest) -> None:
        """Note that a call was given up before it was sent."""
        self._remaining.ended(request, end_time=math.nan, alone_s=math.nan, ok=False)

    def ended(self, sent: Sent, outcome: Outcome) -> None:
        """Learn from a call that has ended, well or not."""
        if outcome.num_cached_tokens is not None:
            self._fleet.observe_cached(
                outcome.instance_id,
                predicted=sent.decision.chosen.num_cached_tokens,
                actual=outcome.num_cached_tokens,
            )
        self._remaining.ended(
            sent.request,
            end_time=sent.time + outcome.e2el_s,
            alone_s=self.idle_s(sent, outcome),
            ok=outcome.ok,
        )
        if outcome.ok:
            self._learn(sent, outcome)

    def idle_s(self, sent: Sent, outcome: Outcome) -> float:
        """Service of a call that has ended, had nothing else run on its instance.

        By the configured speed of the instance: what was learned of it is mostly how busy it is.
        """
        alone_s = self._prefill_s(sent, outcome)
        alone_s += _decode_s(sent, outcome) / sent.decision.chosen.stretch
        return alone_s / self._fleet.drift(outcome.instance_id)

    def _learn(self, sent: Sent, outcome: Outcome) -> None:
        request, chosen = sent.request, sent.decision.chosen
        decode_s = _decode_s(sent, outcome)
        self._fleet.observe(
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

    def _prefill_s(self, sent: Sent, outcome: Outcome) -> float:
        """Prefill of the prompt tokens that were computed, on the instance that did.

        What a run has attained is priced by the latency model, for the tokens that its calls
        turned out to have: measured durations contain the time spent waiting.
        """
        if outcome.num_prompt_tokens is None:
            return sent.decision.chosen.prefill_s
        instance_id = sent.decision.chosen.instance_id
        latency = self._fleet.instance(instance_id).latency
        num_cached = outcome.num_cached_tokens or 0
        return self._fleet.drift(instance_id) * latency.prefill_s(
            outcome.num_prompt_tokens - num_cached, num_cached_tokens=num_cached
        )

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
            * self._fleet.mean_service_s(
                model,
                stage.prompt_tokens,
                self.lengths.output_tokens(workflow.name, stage.name),
            )
            for stage in after
        )


def _decode_s(sent: Sent, outcome: Outcome) -> float:
    """Decode as predicted, for the tokens that a call turned out to have."""
    predicted_s, expected = sent.decision.chosen.decode_s, sent.request.expected_output_tokens
    if outcome.num_output_tokens is None or expected <= 1.0:
        return predicted_s
    return predicted_s * max(0, outcome.num_output_tokens - 1) / (expected - 1.0)
