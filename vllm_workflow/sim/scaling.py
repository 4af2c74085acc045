"""Step times of an instance that is faster or slower than another."""

from __future__ import annotations

from dataclasses import replace

from vllm_workflow.core.latency import LatencyModel

_TIMES = (
    *("overhead_s", "weights_s", "per_token_s", "per_token_below_knee_s", "per_seq_s"),
    *("per_kv_token_s", "per_prefill_kv_token_s"),
)


def scaled_latency(latency: LatencyModel, speed: float) -> LatencyModel:
    """Return the step time of a GPU that runs `speed` times as fast; all else is alike."""
    return replace(latency, **{name: getattr(latency, name) / speed for name in _TIMES})
