"""What is predicted of a call before it is sent, and learned when it has ended."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, Final, final

from vllm_workflow.core.fleet import Fleet
from vllm_workflow.core.learned import Learned
from vllm_workflow.core.lengths import (
    CLIENT,
    DECLARED,
    LEARNED,
    PRIOR,
    Expected,
    Lengths,
    StageKey,
)
from vllm_workflow.core.prefix import Segment
from vllm_workflow.core.runs import Attained, AttainedService
from vllm_workflow.core.types import Candidate, Decision, Outcome, StageRequest
from vllm_workflow.core.workflow import WorkflowProfile

_REST_KEPT_FOR: Final = 32
"""Outcomes after which the rest of a run is predicted anew: it changes slowly, costs time."""

_FINAL: Expected = 0.0, CLIENT
_UNKNOWN: Expected = 0.0, PRIOR
_MAX_TEXT_BYTES: Final = 1 << 20
"""Bodies beyond this say nothing about tokens per byte."""

_MAX_RESTS: Final = 1024
"""Predictions kept at most: the model in their key comes from clients."""


@final
class Sent:
    """A call on its way."""

    __slots__ = (
        "decision",
        "num_prompt_bytes",
        "request",
        "time",
    )

    request: Final[StageRequest]
    decision: Final[Decision]
    num_prompt_bytes: Final[int]
    time: Final[float]
    """Instant at which it was bound."""

    def __init__(
        self,
        request: StageRequest,
        decision: Decision,
        num_prompt_bytes: int,
        time: float,
    ) -> None:
        self.request = request
        self.decision = decision
        self.num_prompt_bytes = num_prompt_bytes
        self.time = time


class Predictor:
    """Lengths, what runs have attained, and how long they go on: learned from outcomes.

    Args:
        fleet: Prices tokens in seconds, and is told how fast instances turn out to be.
        workflows: Declared ones, believed until enough runs were seen.
    """

    def __init__(self, fleet: Fleet, workflows: Iterable[WorkflowProfile] = ()) -> None:
        self.learned = Learned()
        self.risk_quantile = 0.0
        """See `PolicyConfig.risk_quantile`."""
        self._fleet = fleet
        self._workflows: dict[str, WorkflowProfile] = {}
        self._rests: dict[tuple[str, str, str, str], Expected] = {}
        self._attained = AttainedService()
        self.num_settled = 0
        self.num_predicted: defaultdict[tuple[str, str], int] = defaultdict(int)
        """Predictions by where length and rest came from, see `lengths.Expected`."""
        self.declare(workflows)

    @property
    def lengths(self) -> Lengths:
        return self.learned.lengths

    def declare(self, workflows: Iterable[WorkflowProfile]) -> None:
        """Take these for the declared ones; what was learned stays, and counts for more."""
        self._workflows = {w.name: w for w in workflows}
        self._rests.clear()
        self._declare(self.learned)

    def restore(self, data: Mapping[str, Any], *, source: str) -> None:
        """Begin with what an earlier process had learned, see `Learned.from_mapping`.

        Raises:
            ConfigError: `data` is not that; nothing is changed.
        """
        learned = Learned.from_mapping(data, source=source)
        self._declare(learned)
        self.learned = learned

    def _declare(self, learned: Learned) -> None:
        learned.lengths.declare(
            {
                (workflow.name, stage.name): stage.output_tokens
                for workflow in self._workflows.values()
                for stage in workflow.stages
            }
        )

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
        lengths = self.learned.lengths
        num_prompt_tokens = lengths.prompt_tokens(num_prompt_bytes)
        output_tokens, output_from = lengths.output_tokens(
            (request.tenant_id, request.workflow, request.stage), num_prompt_tokens, max_tokens
        )
        rest_s, rest_from = _FINAL if request.final else self._rest_s(request)
        self.num_predicted[output_from, rest_from] += 1
        prefix = [Segment(at, lengths.prompt_tokens(num_bytes)) for at, num_bytes in head]
        return StageRequest(
            request.request_id,
            request.arrival_time,
            request.workflow_id,
            request.workflow,
            request.stage,
            request.tenant_id,
            request.model,
            request.priority,
            request.deadline,
            request.run_arrival_time,
            attained.total_s,
            attained.path_s,
            rest_s,
            request.service_s,
            num_prompt_tokens,
            output_tokens,
            max_tokens,
            tuple(prefix),
            request.final,
            output_from,
            rest_from,
        )

    def attained(self, request: StageRequest) -> Attained:
        """Service that the run of a call has had by now."""
        return self._attained.of(request)

    def began(self, request: StageRequest) -> None:
        """Note that a call has been made."""
        self._attained.begin(request)
        self.learned.remaining.began(request)

    def gave_up(self, request: StageRequest) -> None:
        """Note that a call was given up before it was sent."""
        self.learned.remaining.ended(request, end_time=math.nan, alone_s=math.nan, ok=False)

    def ended(self, sent: Sent, outcome: Outcome) -> float:
        """Learn from a call that has ended, well or not; returns its service as it would have
        been alone, as far as its tokens are known."""
        if outcome.num_cached_tokens is not None:
            self._fleet.observe_cached(
                outcome.instance_id,
                predicted=sent.decision.chosen.num_cached_tokens,
                actual=outcome.num_cached_tokens,
            )
        chosen = sent.decision.chosen
        drift = self._fleet.drift(chosen.instance_id)
        computed_s = self._computed_s(chosen, outcome)
        prefill_s = chosen.prefill_s if computed_s is None else drift * computed_s
        decode_s = _decode_s(sent, outcome)
        alone_s = prefill_s + decode_s / chosen.stretch
        # What was learned of the speed of an instance is mostly how busy it is.
        self.learned.remaining.ended(
            sent.request,
            end_time=sent.time + outcome.e2el_s,
            alone_s=alone_s / drift,
            ok=outcome.ok,
        )
        if outcome.ok:
            self._learn(sent, outcome, computed_s, decode_s)
        return alone_s

    def _learn(
        self, sent: Sent, outcome: Outcome, computed_s: float | None, decode_s: float
    ) -> None:
        request, chosen = sent.request, sent.decision.chosen
        self._fleet.observe(
            chosen.instance_id,
            predicted_s=chosen.queue_s + chosen.prefill_s + decode_s,
            actual_s=outcome.e2el_s,
        )
        if request.workflow_id:
            prefill_s = chosen.prefill_s
            if computed_s is not None:
                prefill_s = self._fleet.drift(chosen.instance_id) * computed_s
            self._attained.end(request, prefill_s + decode_s)
        # Larger bodies are mostly images, whose bytes are not text.
        if outcome.num_prompt_tokens and 0 < sent.num_prompt_bytes <= _MAX_TEXT_BYTES:
            self.lengths.observe_prompt(outcome.num_prompt_tokens / sent.num_prompt_bytes)
        if outcome.num_output_tokens is not None:
            self.lengths.observe(
                _stage(request),
                num_prompt_tokens=request.num_prompt_tokens,
                output_tokens=outcome.num_output_tokens,
            )
        self.num_settled += 1
        if self.num_settled % _REST_KEPT_FOR == 0:
            self._rests.clear()

    def _computed_s(self, chosen: Candidate, outcome: Outcome) -> float | None:
        """Prefill of the prompt tokens that were computed, by the configured speed of the
        instance that did; None if they were not counted.

        What a run has attained is priced by the latency model, for the tokens that its calls
        turned out to have: measured durations contain the time spent waiting.
        """
        if outcome.num_prompt_tokens is None:
            return None
        num_cached = outcome.num_cached_tokens or 0
        return self._fleet.instance(chosen.instance_id).latency.prefill_s(
            outcome.num_prompt_tokens - num_cached, num_cached_tokens=num_cached
        )

    def _rest_s(self, request: StageRequest) -> Expected:
        """What was learned from runs, else what was declared, else nothing."""
        learned_s = self.learned.remaining.after(request, self.risk_quantile)
        if learned_s is not None:
            return learned_s, LEARNED
        workflow = self._workflows.get(request.workflow)
        if workflow is None or not workflow.has(request.stage):
            return _UNKNOWN
        key = (request.tenant_id, request.workflow, request.stage, request.model)
        rest = self._rests.get(key)
        if rest is None:
            if len(self._rests) >= _MAX_RESTS:
                self._rests.clear()
            rest_s = self._declared_rest_s(request, workflow)
            rest = self._rests[key] = rest_s, DECLARED
        return rest

    def _declared_rest_s(self, request: StageRequest, workflow: WorkflowProfile) -> float:
        """Rounds and prompts as declared; answers as counted, where there were any."""
        rest_s = 0.0
        for stage in workflow.after(request.stage):
            output_tokens, _ = self.lengths.output_tokens(
                (request.tenant_id, workflow.name, stage.name), stage.prompt_tokens
            )
            rest_s += stage.rounds * self._fleet.mean_service_s(
                request.model, stage.prompt_tokens, output_tokens
            )
        return rest_s


def _stage(request: StageRequest) -> StageKey:
    return request.tenant_id, request.workflow, request.stage


def _decode_s(sent: Sent, outcome: Outcome) -> float:
    """Decode as predicted, for the tokens that a call turned out to have."""
    predicted_s, expected = sent.decision.chosen.decode_s, sent.request.expected_output_tokens
    if outcome.num_output_tokens is None or expected <= 1.0:
        return predicted_s
    return predicted_s * max(0, outcome.num_output_tokens - 1) / (expected - 1.0)
