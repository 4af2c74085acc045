"""What the worker knows of the requests of a step, and what a step of them costs.

Nothing of vLLM is imported: the shapes of its `SchedulerOutput` are read by attribute, the names
are checked in `compat.py`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vllm_workflow.core.latency import LatencyModel, prefill_attention

NUM_OUTPUT_TOKENS_KEY = "emulated_num_output_tokens"
"""Key in a request's `vllm_xargs`: tokens of its answer, the end token included."""
NEVER = sys.maxsize


@dataclass(slots=True)
class EmulatedRequest:
    """One request that the scheduler has given to the worker."""

    num_prompt_tokens: int
    num_prefill_tokens: int
    """Tokens to compute before the next output token: the prompt, and after a preemption also the
    output so far."""
    end_at: int = NEVER
    """Number of the output token that is the end token."""
    end_token_id: int | None = None
    """None: no token ends its answer."""


@dataclass(slots=True)
class Step:
    """One step: what it costs is counted as in `LatencyModel.step_s`."""

    num_prefill_tokens: int = 0
    num_decode_seqs: int = 0
    num_kv_tokens: int = 0
    prefill_attention: float = 0.0
    continues: bool = False
    """Some of its requests were running before."""
    request_ids: list[str] = field(default_factory=list)
    token_ids: list[list[int]] = field(default_factory=list)
    """Per request: its next token, or none within its prompt."""
    output_numbers: dict[str, int] = field(default_factory=dict)
    """Request with a hidden end -> number of the output token of this step."""

    def duration_s(self, latency: LatencyModel) -> float:
        """What the GPU takes for this step."""
        return latency.step_s(
            num_prefill_tokens=self.num_prefill_tokens,
            num_decode_seqs=self.num_decode_seqs,
            num_kv_tokens=self.num_kv_tokens,
            prefill_attention=self.prefill_attention,
        )


class EmulatedRequests:
    """All requests that the worker knows, by `request_id`."""

    def __init__(self, *, token_id: int) -> None:
        """Begin without requests; every output token but the last of a request is `token_id`."""
        self._token_id = token_id
        self._live: dict[str, EmulatedRequest] = {}

    def __len__(self) -> int:
        return len(self._live)

    def __getitem__(self, request_id: str) -> EmulatedRequest:
        return self._live[request_id]

    def forget(self, request_ids: set[str]) -> None:
        """Drop requests that have ended, in whatever way."""
        for request_id in request_ids:
            self._live.pop(request_id, None)

    def step(self, output: Any) -> Step:
        """Turn vLLM's `SchedulerOutput` into a step, and learn of new and resumed requests."""
        step = Step()
        num_scheduled: Mapping[str, int] = output.num_scheduled_tokens
        for new in output.scheduled_new_reqs:
            request, num_output = _new_request(new)
            self._live[new.req_id] = request
            self._add_prefill(
                step,
                (new.req_id, request, new.num_computed_tokens, num_output),
                num_scheduled[new.req_id],
            )
        cached = output.scheduled_cached_reqs
        step.continues = bool(cached.req_ids)
        live, resumed, token_id = self._live, cached.resumed_req_ids, self._token_id
        num_decode = num_context = 0
        # The same few lines for each running request in each step: no calls in here.
        for each in zip(cached.req_ids, cached.num_computed_tokens, cached.num_output_tokens):
            request_id, num_computed, num_output = each
            request = live[request_id]
            if request_id in resumed:
                request.num_prefill_tokens = request.num_prompt_tokens + num_output
            if num_computed < request.num_prefill_tokens:
                self._add_prefill(
                    step,
                    (request_id, request, num_computed, num_output),
                    num_scheduled[request_id],
                )
                continue
            num_decode += 1
            num_context += num_computed + 1
            step.request_ids.append(request_id)
            if request.end_at == NEVER:
                step.token_ids.append([token_id])
            else:
                self._emit(step, request_id, request, num_output)
        step.num_decode_seqs = num_decode
        step.num_kv_tokens = num_context
        return step

    def _add_prefill(
        self, step: Step, whose: tuple[str, EmulatedRequest, int, int], num_tokens: int
    ) -> None:
        request_id, request, num_computed, num_output = whose
        step.num_prefill_tokens += num_tokens
        step.prefill_attention += prefill_attention(num_tokens, num_computed)
        step.request_ids.append(request_id)
        if num_computed + num_tokens >= request.num_prefill_tokens:
            self._emit(step, request_id, request, num_output)
        else:
            step.token_ids.append([])

    def _emit(self, step: Step, request_id: str, request: EmulatedRequest, num_output: int) -> None:
        # The scheduler's count, tokens in flight included, survives preemption; one of our own
        # would not know which of those in flight were dropped.
        number = num_output + 1
        token_id = request.end_token_id if number >= request.end_at else None
        step.token_ids.append([self._token_id if token_id is None else token_id])
        if request.end_at != NEVER:
            step.output_numbers[request_id] = number


def hidden_num_output_tokens(extra_args: object) -> int | None:
    """The length that a request's `vllm_xargs` ask for; None without one that makes sense.

    Whatever a client sent, this never raises.
    """
    if type(extra_args) is not dict:
        return None
    value = extra_args.get(NUM_OUTPUT_TOKENS_KEY)
    if type(value) is float and math.isfinite(value) and value == int(value):
        value = int(value)
    return value if type(value) is int and 1 <= value < NEVER else None


def _new_request(new: Any) -> tuple[EmulatedRequest, int]:
    """A request as the scheduler first gives it, and the output tokens that it has already.

    vLLM's second model runner gets resumed requests as new ones, output so far included.
    """
    num_prompt = _num_prompt_tokens(new)
    num_prefill = num_prompt
    if new.prefill_token_ids is not None:
        num_prefill = len(new.prefill_token_ids)
    params = new.sampling_params
    request = EmulatedRequest(num_prompt, num_prefill, end_token_id=_end_token_id(params))
    length = hidden_num_output_tokens(params.extra_args)
    if length is not None and request.end_token_id is not None:
        # A real model's end token is masked until there are `min_tokens` others.
        request.end_at = max(length, params.min_tokens + 1 if params.min_tokens else 1)
    return request, num_prefill - num_prompt


def _num_prompt_tokens(new: Any) -> int:
    if new.prompt_token_ids is not None:
        return len(new.prompt_token_ids)
    return int(new.prompt_embeds.shape[0])


def _end_token_id(params: Any) -> int | None:
    """The token that ends an answer; None where none does: vLLM drops it under `ignore_eos`."""
    if params.ignore_eos:
        return None
    if params.eos_token_id is not None:
        return int(params.eos_token_id)
    return min(params.stop_token_ids, default=None) if params.stop_token_ids else None
