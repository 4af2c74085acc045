"""A minimal continuous-batching replay: just enough of vLLM's V1 scheduler to check a step model.

Running calls first, then admission in order of arrival, chunked prefill within one token
budget; no KV limit, no preemption, no prefix cache. The simulator of the package does these.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vllm_workflow.core.latency import LatencyModel, prefill_attention


@dataclass(slots=True, kw_only=True)
class Replayed:
    """One request: what it asks for, and what the replay says of it."""

    arrival_time: float
    num_prompt_tokens: int
    num_output_tokens: int
    first_token_time: float = math.nan
    last_token_time: float = math.nan
    num_computed: int = 0
    num_emitted: int = 0

    @property
    def ttft_s(self) -> float:
        return self.first_token_time - self.arrival_time

    @property
    def e2el_s(self) -> float:
        return self.last_token_time - self.arrival_time

    @property
    def tpot_s(self) -> float:
        decode_s = self.last_token_time - self.first_token_time
        return decode_s / (self.num_output_tokens - 1) if self.num_output_tokens > 1 else math.nan


def replay(requests: Sequence[Replayed], model: LatencyModel, *, max_num_seqs: int) -> None:
    """Fill in the token times of `requests`, which must be sorted by arrival."""
    running: list[Replayed] = []
    now, num_admitted = 0.0, 0
    while running or num_admitted < len(requests):
        if not running:
            now = max(now, requests[num_admitted].arrival_time)
        budget = model.max_num_batched_tokens
        num_seqs = num_prompt = 0
        num_kv = attention = 0.0
        scheduled: list[tuple[Replayed, int]] = []
        candidates = list(running)
        while budget > 0:
            if candidates:
                each = candidates.pop(0)
            elif (
                num_admitted < len(requests)
                and len(running) < max_num_seqs
                and requests[num_admitted].arrival_time <= now
            ):
                each = requests[num_admitted]
                running.append(each)
                num_admitted += 1
            else:
                break
            left = each.num_prompt_tokens - each.num_computed
            if left > 0:
                chunk = min(left, budget)
                num_prompt += chunk
                attention += prefill_attention(chunk, each.num_computed)
            else:
                chunk = 1
                num_seqs += 1
                num_kv += each.num_prompt_tokens + each.num_emitted
            budget -= chunk
            scheduled.append((each, chunk))
        now += model.step_s(
            num_prefill_tokens=num_prompt,
            num_decode_seqs=num_seqs,
            num_kv_tokens=num_kv,
            prefill_attention=attention,
        )
        for each, chunk in scheduled:
            _advance(each, chunk, now)
        running = [r for r in running if r.num_emitted < r.num_output_tokens]


def _advance(each: Replayed, chunk: int, now: float) -> None:
    if each.num_computed < each.num_prompt_tokens:
        each.num_computed += chunk
        if each.num_computed < each.num_prompt_tokens:
            return
        each.first_token_time = now
    each.num_emitted += 1
    each.last_token_time = now
