"""How fast a run can be at best: what no scheduler can beat, and what SLOs are multiples of."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from vllm_workflow.core.latency import LatencyModel, prefill_attention
from vllm_workflow.sim.fleet import SimInstance
from vllm_workflow.sim.types import TraceCall, TraceRun


def critical_path_s(run: TraceRun, fleet: Sequence[SimInstance]) -> float:
    """Return a lower bound of a run's duration, LB1.

    The longest path through the run's calls and gaps, each call with its true lengths, alone on
    the instance that is fastest for it, its whole prefix in the cache. No simulated run on
    `fleet` is faster, whatever the policy, as long as reading the context of one sequence takes
    less time than the rest of a step.

    Raises:
        ValueError: No instance.
    """
    if not fleet:
        raise ValueError("fleet: expected at least one instance, got none")
    kinds = {(i.latency, i.block_size) for i in fleet}
    return _longest_path_s(
        run, lambda call: min(call_s(call, latency, size) for latency, size in kinds)
    )


def rest_after_s(run: TraceRun, fleet: Sequence[SimInstance]) -> dict[str, float]:
    """Return call id -> the longest path of calls and gaps that follow it, as in LB1.

    Raises:
        ValueError: No instance.
    """
    if not fleet:
        raise ValueError("fleet: expected at least one instance, got none")
    kinds = {(i.latency, i.block_size) for i in fleet}
    rests: dict[str, float] = {}
    for call in reversed(run.calls):
        rest_s = rests.setdefault(call.call_id, 0.0)
        path_s = call.gap_s + min(call_s(call, latency, size) for latency, size in kinds) + rest_s
        for before in call.after:
            rests[before] = max(rests.get(before, 0.0), path_s)
    return rests


def with_slo_scale(
    runs: Iterable[TraceRun], scale: float, fleet: Sequence[SimInstance]
) -> list[TraceRun]:
    """Return the runs with `slo_s = scale × LB1`, see `critical_path_s`.

    Raises:
        ValueError: A scale that is not above 0, or no instance.
    """
    if not 0.0 < scale < math.inf:
        raise ValueError(f"scale: expected a number above 0, got {scale!r}")
    return [replace(run, slo_s=scale * critical_path_s(run, fleet)) for run in runs]


def call_s(call: TraceCall, latency: LatencyModel, block_size: int) -> float:
    """Return the least seconds from submission to end of one call on one instance.

    Its prefix is cached as far as full blocks reach, at least one token is computed. A prompt
    may be computed in even chunks beside other work, which below the knee costs less than the
    uneven ones that it would be computed in alone, so the best number of chunks is taken.
    """
    num_head_tokens = sum(part.num_tokens for part in call.prefix)
    num_cached = min(num_head_tokens, call.num_prompt_tokens - 1) // block_size * block_size
    num_new = call.num_prompt_tokens - num_cached
    num_decoded = max(0, call.num_output_tokens - 1)
    # Token j of the output attends to the prompt, to the j − 1 before it and to itself.
    context = num_decoded * call.num_prompt_tokens + num_decoded * (num_decoded + 1) / 2
    decode_s = num_decoded * latency.step_s(num_decode_seqs=1)
    prefill_s = _chunks_s(num_new, latency)
    attention = prefill_attention(num_new, num_cached)
    return (
        prefill_s
        + attention * latency.per_prefill_kv_token_s
        + decode_s
        + context * latency.per_kv_token_s
    )


def _chunks_s(num_tokens: int, latency: LatencyModel) -> float:
    """Seconds of the cheapest number of even chunks: convex in it, least at an end or the knee."""
    least = math.ceil(num_tokens / latency.max_num_batched_tokens)
    numbers = {least}
    if 0.0 < latency.knee_tokens < math.inf:
        at_knee = num_tokens / latency.knee_tokens
        if at_knee < num_tokens:
            numbers |= {max(least, math.floor(at_knee)), max(least, math.ceil(at_knee))}
    numbers.add(max(least, num_tokens))
    return min(n * latency.step_s(num_prefill_tokens=num_tokens / n) for n in numbers)


def _longest_path_s(run: TraceRun, seconds: Callable[[TraceCall], float]) -> float:
    ends: dict[str, float] = {}
    for call in run.calls:
        start = max((ends[before] for before in call.after), default=0.0)
        ends[call.call_id] = start + call.gap_s + seconds(call)
    return max(ends.values(), default=0.0)
