"""Values with a default for every field."""

from __future__ import annotations

from typing import Any

from vllm_workflow.bench.records import CallRecord, RunRecord
from vllm_workflow.bench.replay import PlannedRun
from vllm_workflow.sim.types import PrefixPart, TraceCall, TraceRun


def part(part_id: str, num_tokens: int = 20) -> PrefixPart:
    return PrefixPart(part_id=part_id, num_tokens=num_tokens)


def trace_call(call_id: str = "a", **fields: Any) -> TraceCall:
    defaults = {"stage": call_id, "num_prompt_tokens": 40, "num_output_tokens": 3}
    return TraceCall(call_id=call_id, **{**defaults, **fields})


def trace_run(*calls: TraceCall, run_id: str = "r", **fields: Any) -> TraceRun:
    defaults: dict[str, Any] = {"workflow": "w", "arrival_s": 0.0}
    return TraceRun(run_id=run_id, calls=calls or (trace_call(),), **{**defaults, **fields})


def planned(*calls: TraceCall, **fields: Any) -> PlannedRun:
    run = trace_run(*calls, **fields)
    return PlannedRun(run=run, reference_s=run.slo_s)


def call_record(call_id: str = "a", **fields: Any) -> CallRecord:
    defaults: dict[str, Any] = {
        "run_id": "r",
        "stage": call_id,
        "planned_s": 0.0,
        "sent_s": 0.0,
        "first_token_s": 0.5,
        "end_s": 1.0,
        "token_times_s": (0.5, 0.75, 1.0),
        "num_prompt_tokens": 40,
        "num_output_tokens": 3,
        "num_cached_tokens": 20,
        "instance": "one",
        "status": 200,
    }
    return CallRecord(call_id=call_id, **{**defaults, **fields})


def run_record(*calls: CallRecord, **fields: Any) -> RunRecord:
    calls = calls or (call_record(),)
    defaults: dict[str, Any] = {
        "run_id": "r",
        "workflow": "w",
        "arrival_s": 0.0,
        "end_s": max(call.end_s for call in calls),
        "num_calls": len(calls),
    }
    return RunRecord(calls=calls, **{**defaults, **fields})
