"""Values for tests of the simulator, with a default for every field a test is not about."""

from __future__ import annotations

import math
from collections.abc import Iterable

from vllm_workflow.core.fleet import Instance
from vllm_workflow.core.latency import LatencyModel
from vllm_workflow.core.types import StageRequest
from vllm_workflow.sim.fleet import SimInstance
from vllm_workflow.sim.types import (
    EngineEvent,
    EngineRequest,
    PrefixPart,
    SimEngine,
    TraceCall,
    TraceRun,
)

LATENCY = LatencyModel(
    overhead_s=0.0021,
    weights_s=0.0137,
    per_token_s=7.3e-5,
    per_token_below_knee_s=2.9e-5,
    per_seq_s=1.1e-5,
    per_kv_token_s=1.7e-7,
    per_prefill_kv_token_s=3.1e-9,
    max_num_batched_tokens=2048,
)


def parts(*sizes: tuple[str, int]) -> tuple[PrefixPart, ...]:
    return tuple(PrefixPart(part_id=name, num_tokens=n) for name, n in sizes)


def engine_request(
    request_id: str = "r",
    *,
    now: float = 0.0,
    prompt: int = 100,
    output: int = 10,
    prefix: tuple[PrefixPart, ...] = (),
    deadline: float = math.inf,
    rest_s: float = 0.0,
    service_s: float = 0.0,
) -> EngineRequest:
    return EngineRequest(
        request=StageRequest(
            request_id=request_id,
            arrival_time=now,
            deadline=deadline,
            rest_s=rest_s,
            service_s=service_s,
            num_prompt_tokens=prompt,
        ),
        num_prompt_tokens=prompt,
        num_output_tokens=output,
        prefix=prefix,
    )


def drive(
    engine: SimEngine,
    requests: Iterable[EngineRequest],
    aborts: Iterable[tuple[float, str]] = (),
) -> list[EngineEvent]:
    """Submit each request at its arrival, abort each call at its time, run to the end."""
    actions = [(r.request.arrival_time, 0, r) for r in requests]
    actions += [(time, 1, request_id) for time, request_id in aborts]
    actions.sort(key=lambda a: a[:2])
    events: list[EngineEvent] = []
    for time, is_abort, value in actions:
        while engine.next_event_time() < time:
            events += engine.advance(engine.next_event_time())
        if is_abort:
            engine.abort(value, time)
        else:
            engine.submit(value, time)
    while engine.next_event_time() < math.inf:
        events += engine.advance(engine.next_event_time())
    return events


def trace_call(
    call_id: str = "c",
    *,
    stage: str = "generate",
    prompt: int = 400,
    output: int = 20,
    after: tuple[str, ...] = (),
    gap_s: float = 0.0,
    prefix: tuple[PrefixPart, ...] = (),
) -> TraceCall:
    return TraceCall(
        call_id=call_id,
        stage=stage,
        num_prompt_tokens=prompt,
        num_output_tokens=output,
        after=after,
        gap_s=gap_s,
        prefix=prefix,
    )


def trace_run(
    run_id: str = "run",
    *calls: TraceCall,
    arrival_s: float | None = 0.0,
    slo_s: float | None = None,
    workflow: str = "text2sql",
) -> TraceRun:
    return TraceRun(
        run_id=run_id,
        workflow=workflow,
        calls=calls or (trace_call(),),
        arrival_s=arrival_s,
        slo_s=slo_s,
    )


def sim_instance(
    instance_id: str = "a",
    *,
    latency: LatencyModel = LATENCY,
    actual: LatencyModel | None = None,
    max_num_seqs: int = 16,
    num_kv_blocks: int = 4096,
) -> SimInstance:
    return SimInstance(
        instance=Instance(
            instance_id=instance_id, models=(), latency=latency, max_num_seqs=max_num_seqs
        ),
        num_kv_blocks=num_kv_blocks,
        actual=actual,
    )
