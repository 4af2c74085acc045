"""Runs and calls under way in a simulation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from vllm_workflow.core.handover import handover
from vllm_workflow.core.types import StageRequest
from vllm_workflow.sim.results import CallResult, RunResult
from vllm_workflow.sim.types import EngineRequest, PrefixPart, TraceCall, TraceRun

BYTES_PER_TOKEN: Final = 4.0
"""Of prompts; the dispatcher starts from the same guess and learns from what is counted."""


class RunState:
    """A run under way: what of it has been revealed."""

    __slots__ = (
        "arrival_time",
        "deadline",
        "end_time",
        "final",
        "is_refused",
        "missing",
        "num_open",
        "then",
        "trace",
    )

    def __init__(self, trace: TraceRun, now: float) -> None:
        self.trace = trace
        self.arrival_time = now
        self.deadline = math.inf if trace.slo_s is None else now + trace.slo_s
        """Its own, or what the router says that its tenant is promised."""
        self.end_time = math.nan
        self.is_refused = False
        self.num_open = len(trace.calls)
        self.missing: dict[str, int] = {}
        """Calls yet to end before a call is made."""
        self.then: dict[str, list[TraceCall]] = {}
        for call in trace.calls:
            self.missing[call.call_id] = len(call.after)
            for before in call.after:
                self.then.setdefault(before, []).append(call)
        self.final = announced_as_final(trace, self.then)

    def request(self, call: TraceCall, now: float) -> StageRequest:
        """Return all that the router gets to know of a call when the client makes it."""
        trace = self.trace
        return StageRequest(
            request_id=f"{trace.run_id}/{call.call_id}",
            arrival_time=now,
            workflow_id=trace.run_id,
            workflow=trace.workflow,
            stage=call.stage,
            tenant_id=trace.tenant,
            deadline=self.deadline,
            run_arrival_time=self.arrival_time,
            final=call.call_id == self.final,
        )


def announced_as_final(trace: TraceRun, then: dict[str, list[TraceCall]]) -> str:
    """Id of the call that the client can tell is the last one: its stage says so.

    That is, nothing runs beside it, and its stage has not occurred before in the run: of a
    loop nobody knows which round is the last.
    """
    last = trace.calls[-1]
    open_ends = [c for c in trace.calls if c.call_id not in then]
    if len(open_ends) == 1 and sum(c.stage == last.stage for c in trace.calls) == 1:
        return last.call_id
    return ""


class CallState:
    """A call that has been made."""

    __slots__ = (
        "end_time",
        "first_token_time",
        "instance",
        "num_attempts",
        "num_cached",
        "num_preemptions",
        "predicted",
        "request",
        "run",
        "sent_time",
        "trace",
    )

    def __init__(self, run: RunState, trace: TraceCall, request: StageRequest) -> None:
        self.run = run
        self.trace = trace
        self.request = self.predicted = request
        self.sent_time = self.first_token_time = self.end_time = math.nan
        self.instance = -1
        self.num_attempts = self.num_cached = self.num_preemptions = 0

    def sent(self, service_s: float, now: float) -> EngineRequest:
        """Return the call as its engine gets it, with what the plug-in would read of it.

        Args:
            service_s: Predicted duration on that engine.
            now: Instant of sending.
        """
        request, trace = self.predicted, self.trace
        told = handover(request, service_s=service_s, now=now)
        return EngineRequest(
            request=StageRequest(
                request_id=request.request_id,
                arrival_time=now,
                workflow_id=request.workflow_id,
                workflow=request.workflow,
                stage=request.stage,
                tenant_id=request.tenant_id,
                deadline=math.inf if told.budget_ms is None else now + told.budget_ms / 1e3,
                run_arrival_time=math.nan if told.age_ms is None else now - told.age_ms / 1e3,
                attained_s=(told.attained_ms or 0) / 1e3,
                attained_path_s=(told.attained_path_ms or 0) / 1e3,
                rest_s=told.rest_ms / 1e3,
                service_s=told.service_ms / 1e3,
                num_prompt_tokens=trace.num_prompt_tokens,
                final=request.final,
            ),
            num_prompt_tokens=trace.num_prompt_tokens,
            num_output_tokens=trace.num_output_tokens,
            prefix=trace.prefix,
        )


class PromptHeads:
    """Prompts' heads as a router knows them: hashes of pieces, each with all before it.

    Numbers stand for the hashes, one per piece and what comes before it.
    """

    __slots__ = ("_numbers",)

    def __init__(self) -> None:
        self._numbers: dict[tuple[int, str, int], int] = {}

    def of(self, prefix: Sequence[PrefixPart]) -> list[tuple[int, int]]:
        numbers, number = self._numbers, 0
        head = []
        for part in prefix:
            key = (number, part.part_id, part.num_tokens)
            number = numbers.setdefault(key, len(numbers) + 1)
            head.append((number, int(part.num_tokens * BYTES_PER_TOKEN)))
        return head


def run_result(run: RunState) -> RunResult:
    slo_s = run.trace.slo_s
    if slo_s is None and run.deadline < math.inf:
        slo_s = run.deadline - run.arrival_time
    return RunResult(
        run_id=run.trace.run_id,
        workflow=run.trace.workflow,
        tenant=run.trace.tenant,
        arrival_time=run.arrival_time,
        end_time=run.end_time,
        slo_s=slo_s,
        num_calls=len(run.trace.calls),
    )


def call_result(call: CallState, instance_ids: Sequence[str]) -> CallResult:
    return CallResult(
        run_id=call.run.trace.run_id,
        call_id=call.trace.call_id,
        stage=call.trace.stage,
        instance_id=instance_ids[call.instance] if call.num_attempts else "",
        submit_time=call.request.arrival_time,
        sent_time=call.sent_time,
        first_token_time=call.first_token_time,
        end_time=call.end_time,
        num_prompt_tokens=call.trace.num_prompt_tokens,
        num_output_tokens=call.trace.num_output_tokens,
        num_cached_tokens=call.num_cached,
        num_preemptions=call.num_preemptions,
        num_attempts=call.num_attempts,
    )
