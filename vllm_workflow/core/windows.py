"""Observations from request timestamps alone: what a router sees is enough to fit a model.

Between its first and its last token a request of `n` output tokens takes part in `n - 1`
steps. What else those steps computed follows from the other requests' timestamps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

from vllm_workflow.core.errors import ConfigError
from vllm_workflow.core.fit import Observation, StepLoad
from vllm_workflow.core.latency import prefill_attention

_SAME_STEP = 0.5
"""First tokens closer than this share of a step left the engine in one step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestTiming:
    """One request on one instance; instants on any one clock."""

    first_token_time: float
    last_token_time: float
    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int = 0
    """Prompt tokens that the prefix cache held."""

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if not math.isfinite(value) or (f.name.startswith("num_") and value < 0):
                raise ConfigError(f"{f.name}: expected a finite number from 0, got {value!r}")
        if self.last_token_time < self.first_token_time:
            raise ConfigError(
                "last_token_time: expected at least first_token_time = "
                f"{self.first_token_time!r}, got {self.last_token_time!r}"
            )

    @property
    def num_steps(self) -> int:
        return max(0, self.num_output_tokens - 1)

    @property
    def decode_s(self) -> float:
        return self.last_token_time - self.first_token_time


def decode_windows(
    timings: Sequence[RequestTiming],
    *,
    max_num_batched_tokens: int,
    targets: Sequence[RequestTiming] | None = None,
    least_steps: int = 8,
) -> list[Observation]:
    """Return one observation per request that decoded for at least `least_steps` steps.

    Preempted requests break the count of steps: leave them out of `targets`.

    Args:
        timings: Every request that ran on the instance; a missing one makes steps look slow.
        max_num_batched_tokens: As the server was started with.
        targets: Requests to make observations of, `timings` by default.
        least_steps: Shorter windows are mostly jitter.
    """
    by_first = sorted(timings, key=lambda t: t.first_token_time)
    return [
        Observation(seconds=target.decode_s, loads=_loads(target, by_first, max_num_batched_tokens))
        for target in (timings if targets is None else targets)
        if target.num_steps >= least_steps and target.decode_s > 0.0
    ]


def _loads(
    target: RequestTiming, by_first: Sequence[RequestTiming], budget: int
) -> tuple[StepLoad, ...]:
    """Return the steps of a request's window: the mean decode load, and each prefill on top."""
    start, end, num_steps = target.first_token_time, target.last_token_time, target.num_steps
    num_seqs = num_kv = 0.0
    begun: list[RequestTiming] = []
    for other in by_first:
        if other.first_token_time >= end:
            break
        decoded, context = _decoded_within(other, start, end)
        num_seqs += decoded / num_steps
        num_kv += context / num_steps
        if other.first_token_time > start:
            begun.append(other)
    step_s = (end - start) / num_steps
    begun = [b for b in begun if b.first_token_time > start + _SAME_STEP * step_s]
    prefills = _prefill_steps(begun, _SAME_STEP * step_s, max(1.0, budget - num_seqs))
    if len(prefills) > num_steps:
        prefills = [_merged(prefills, num_steps)]
    loads = [
        StepLoad(
            count=count,
            num_prefill_tokens=tokens,
            num_decode_seqs=num_seqs,
            num_kv_tokens=num_kv,
            prefill_attention=attention,
        )
        for count, tokens, attention in prefills
    ]
    num_left = num_steps - sum(load.count for load in loads)
    plain = StepLoad(count=num_left, num_decode_seqs=num_seqs, num_kv_tokens=num_kv)
    return (*loads, plain)


def _decoded_within(other: RequestTiming, start: float, end: float) -> tuple[float, float]:
    """Tokens that a request decoded in a window, at an even pace, and their context, summed."""
    if other.decode_s <= 0.0 or other.last_token_time <= start:
        return 0.0, 0.0
    pace = other.num_steps / other.decode_s
    from_token = max(0.0, start - other.first_token_time) * pace
    to_token = min(other.decode_s, end - other.first_token_time) * pace
    num_decoded = max(0.0, to_token - from_token)
    mean_context = other.num_prompt_tokens + 0.5 * (from_token + to_token) + 0.5
    return num_decoded, num_decoded * mean_context


def _prefill_steps(
    begun: Sequence[RequestTiming], same_step_s: float, budget: float
) -> list[tuple[float, float, float]]:
    """Return (steps, prompt tokens, attention) of each prefill, those of one step together."""
    groups: list[list[RequestTiming]] = []
    for each in begun:
        if groups and each.first_token_time - groups[-1][-1].first_token_time < same_step_s:
            groups[-1].append(each)
        else:
            groups.append([each])
    steps: list[tuple[float, float, float]] = []
    for group in groups:
        computed = [max(1, t.num_prompt_tokens - t.num_cached_tokens) for t in group]
        num_tokens = float(sum(computed))
        attention = sum(
            prefill_attention(c, t.num_prompt_tokens - c) for c, t in zip(computed, group)
        )
        while num_tokens > 0.0:
            chunk = min(num_tokens, budget)
            steps.append((1.0, chunk, attention * chunk / sum(computed)))
            num_tokens -= chunk
    return steps


def _merged(
    prefills: Sequence[tuple[float, float, float]], num_steps: int
) -> tuple[float, float, float]:
    """Spread more prefills than there are steps evenly over all steps."""
    tokens = sum(p[1] for p in prefills) / num_steps
    return float(num_steps), tokens, sum(p[2] for p in prefills) / num_steps
