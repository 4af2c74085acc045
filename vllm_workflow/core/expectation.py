"""When the next byte of an answer is due, from the latency model of its instance."""

from __future__ import annotations

import math

from vllm_workflow.core.fleet import Fleet
from vllm_workflow.core.types import Candidate, StageRequest

_FACTOR = 4.0
"""Generous: others may share the instance, and its engine may prefer them for a while."""
_FLOOR_S = 0.25
"""Of the way there and back, and of a machine that is busy with something else."""
_HARD_FACTOR = 15.0
"""Beyond what sharing, preemption or a throttled GPU explain."""
_HARD_FLOOR_S = 3.0


def first_byte_s(chosen: Candidate, *, stream: bool, ahead_s: float = 0.0) -> float:
    """Predicted seconds from forwarding to the first byte of an answer.

    Args:
        chosen: The prediction that the call was sent with; what was learned of the speed of its
            instance is in it.
        stream: Without it an answer comes in one piece at its end.
        ahead_s: Prefill of calls sent there before that have no first byte either.
    """
    return ahead_s + (chosen.queue_s + chosen.prefill_s if stream else chosen.finish_s)


def answer_at_most_s(request: StageRequest, chosen: Candidate) -> float:
    """Predicted seconds of the longest answer that the client allows; `inf` if it sets no bound."""
    if request.max_output_tokens is None:
        return math.inf
    decoded = max(1.0, request.expected_output_tokens - 1.0)
    return chosen.queue_s + chosen.prefill_s + chosen.decode_s * request.max_output_tokens / decoded


def next_byte_s(fleet: Fleet, instance_id: str, request: StageRequest) -> float:
    """Predicted seconds between two pieces of a stream, if the step is as long as steps get.

    That is one with as many prompt tokens as fit beside the calls that decode.
    """
    latency = fleet.instance(instance_id).latency
    num_seqs = max(1, fleet.num_outstanding(instance_id))
    context = request.num_prompt_tokens + request.expected_output_tokens
    return fleet.drift(instance_id) * latency.step_s(
        num_prefill_tokens=max(0, latency.max_num_batched_tokens - num_seqs),
        num_decode_seqs=num_seqs,
        num_kv_tokens=num_seqs * context,
    )


def overdue_after_s(expected_s: float) -> float:
    """Silence after which it is worth to look whether an instance still lives."""
    return _FACTOR * expected_s + _FLOOR_S


def hopeless_after_s(expected_s: float) -> float:
    """Silence after which an engine counts as stuck, even if its server says it is well."""
    return _HARD_FACTOR * expected_s + _HARD_FLOOR_S
