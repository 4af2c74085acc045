"""How fast the instances of a decision log really were, and how well a replay agrees with it.

Each instance is simulated alone, with the calls that it got, when it got them. Its factor is
the one by which every step takes longer than configured so that calls take as long as they did
(in the median): neither the router nor the other instances have a part in it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from statistics import median

from vllm_workflow.core.config import PolicyConfig
from vllm_workflow.core.latency import LatencyModel
from vllm_workflow.core.types import StageRequest
from vllm_workflow.sim.fleet import SimInstance, event_engine
from vllm_workflow.sim.log_calls import LoggedCall
from vllm_workflow.sim.trace_decisions import LoggedRun
from vllm_workflow.sim.types import EngineRequest, EventKind

MIN_CALLS = 20
"""Of an instance; with fewer it is taken to be as configured."""
MAX_FACTOR = 8.0
"""By which an instance may be slower or faster than configured, as in `core.fleet`."""
_MAX_ROUNDS = 6
_CLOSE_ENOUGH = 0.01
"""Of the logarithm of durations."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """One instance."""

    factor: float = 1.0
    """Step time over step time as configured."""
    error: float = math.nan
    """Median of how far a call's replayed duration is off, as a share of it; `nan` if unknown."""
    num_calls: int = 0


def speeds(
    runs: Sequence[LoggedRun], fleet: Sequence[SimInstance], engine_policy: PolicyConfig
) -> dict[str, Speed]:
    """Return how fast each instance was.

    Args:
        runs: Of a log.
        fleet: Their instances, as configured.
        engine_policy: Of the engines.

    Raises:
        ConfigError: A call that its instance cannot hold.
    """
    by_id = {each.instance.instance_id: each for each in fleet}
    calls: dict[str, list[LoggedCall]] = {name: [] for name in by_id}
    for run in runs:
        for call in run.calls:
            if call.instance_id in calls:
                calls[call.instance_id].append(call)
    return {
        name: _speed(sorted(of_it, key=lambda call: call.sent_time), by_id[name], engine_policy)
        for name, of_it in calls.items()
    }


def as_fast(fleet: Sequence[SimInstance], found: Mapping[str, Speed]) -> tuple[SimInstance, ...]:
    """Return the fleet with each instance as fast as it was found to be."""
    return tuple(
        replace(each, actual=scaled(each.latency, found[each.instance.instance_id].factor))
        if each.instance.instance_id in found
        else each
        for each in fleet
    )


def scaled(latency: LatencyModel, factor: float) -> LatencyModel:
    """Return a latency model whose every step takes `factor` times as long."""
    seconds = [f.name for f in fields(latency) if f.init and f.name.endswith("_s")]
    return replace(latency, **{name: factor * getattr(latency, name) for name in seconds})


def _speed(calls: Sequence[LoggedCall], instance: SimInstance, policy: PolicyConfig) -> Speed:
    if len(calls) < MIN_CALLS:
        return Speed(num_calls=len(calls))
    best = (math.inf, 0.0, 0.0)
    log_factor, low, high = 0.0, -math.log(MAX_FACTOR), math.log(MAX_FACTOR)
    for _ in range(_MAX_ROUNDS):
        slower = replace(instance, actual=scaled(instance.latency, math.exp(log_factor)))
        errors = _log_errors(calls, slower, policy)
        bias = median(errors)
        best = min(best, (abs(bias), log_factor, median(map(abs, errors))))
        if abs(bias) < _CLOSE_ENOUGH:
            break
        # Slower steps make calls longer: the factor lies on one side of every one tried.
        low, high = (low, log_factor) if bias > 0.0 else (log_factor, high)
        log_factor = log_factor - bias
        if not low < log_factor < high:
            log_factor = 0.5 * (low + high)
    return Speed(factor=math.exp(best[1]), error=math.expm1(best[2]), num_calls=len(calls))


def _log_errors(
    calls: Sequence[LoggedCall], instance: SimInstance, policy: PolicyConfig
) -> list[float]:
    """Return per call the logarithm of its duration as replayed over that as it was."""
    engine = event_engine(instance, policy)
    begin = calls[0].sent_time
    ends: dict[str, float] = {}
    for number, call in enumerate(calls):
        now = call.sent_time - begin
        while engine.next_event_time() <= now:
            for event in engine.advance(engine.next_event_time()):
                if event.kind is EventKind.FINISHED:
                    ends[event.request_id] = event.time
        engine.submit(_request(call, str(number), now), now)
    while math.isfinite(engine.next_event_time()):
        for event in engine.advance(engine.next_event_time()):
            if event.kind is EventKind.FINISHED:
                ends[event.request_id] = event.time
    return [
        math.log((ends[str(number)] - (call.sent_time - begin)) / (call.end_time - call.sent_time))
        for number, call in enumerate(calls)
    ]


def _request(call: LoggedCall, request_id: str, now: float) -> EngineRequest:
    return EngineRequest(
        request=StageRequest(
            request_id=request_id,
            arrival_time=now,
            workflow=call.workflow,
            stage=call.stage,
            deadline=now + call.deadline - call.sent_time,
            rest_s=call.rest_s,
            service_s=call.service_s,
            num_prompt_tokens=call.num_prompt_tokens,
        ),
        num_prompt_tokens=call.num_prompt_tokens,
        num_output_tokens=call.num_output_tokens,
        prefix=call.prefix,
    )
