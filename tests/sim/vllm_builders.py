"""vLLM servers in virtual time and calls for them, with a default for everything."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Iterable
from typing import Any

import pytest

from vllm_workflow.core.latency import LatencyModel, prefill_attention
from vllm_workflow.core.types import StageRequest
from vllm_workflow.sim.types import EngineEvent, EngineRequest, EventKind, PrefixPart
from vllm_workflow.sim.vllm_server import VllmServer

with warnings.catch_warnings():  # those of vLLM's dependencies are none of ours
    warnings.simplefilter("ignore")
    from vllm.sampling_params import SamplingParams
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.engine.core import EngineCore as EngineCore
    from vllm.v1.outputs import ModelRunnerOutput as ModelRunnerOutput
    from vllm.v1.request import Request
    from vllm.v1.request import RequestStatus as RequestStatus

    from vllm_workflow.sim.vllm_engine import VllmEngine
    from vllm_workflow.sim.vllm_engine import vllm_engine as vllm_engine

KIND_ORDER = [EventKind.FIRST_TOKEN, EventKind.FINISHED]
LATENCY = LatencyModel(
    overhead_s=0.001,
    weights_s=0.009,
    per_token_s=1e-4,
    per_token_below_knee_s=4e-5,
    per_seq_s=2e-5,
    per_kv_token_s=1e-6,
    per_prefill_kv_token_s=1e-8,
)


def engine(
    instance_id: str = "a",
    *,
    latency: LatencyModel = LATENCY,
    schedule_s: float = 0.0,
    num_kv_blocks: int = 1001,
    max_model_len: int = 8192,
    policy: Any = None,
    **server: Any,
) -> VllmEngine:
    """By default vLLM's own scheduler, asynchronous."""
    started_with = VllmServer(
        num_kv_blocks=num_kv_blocks, max_model_len=max_model_len, policy=policy, **server
    )
    return VllmEngine(instance_id, latency, started_with, schedule_s=schedule_s)


def part(part_id: str, num_tokens: int) -> PrefixPart:
    return PrefixPart(part_id=part_id, num_tokens=num_tokens)


def call(
    request_id: str = "r",
    *,
    prompt: int = 100,
    output: int = 10,
    prefix: tuple[PrefixPart, ...] = (),
    deadline: float = math.inf,
    **request: Any,
) -> EngineRequest:
    return EngineRequest(
        request=StageRequest(
            request_id=request_id,
            arrival_time=0.0,
            deadline=deadline,
            num_prompt_tokens=max(1, prompt),
            **request,
        ),
        num_prompt_tokens=prompt,
        num_output_tokens=output,
        prefix=prefix,
    )


def advance_to(simulated: VllmEngine, now: float) -> list[EngineEvent]:
    """As a simulator does it: from event to event."""
    events: list[EngineEvent] = []
    while (time := simulated.next_event_time()) <= now and time < math.inf:
        events += simulated.advance(time)
    return events


def drain(simulated: VllmEngine) -> list[EngineEvent]:
    return advance_to(simulated, math.inf)


def run(
    simulated: VllmEngine, arrivals: Iterable[tuple[float, EngineRequest]]
) -> list[EngineEvent]:
    """Submit each call at its instant, and go on until the engine is idle."""
    events: list[EngineEvent] = []
    for time, each in arrivals:
        events += advance_to(simulated, math.nextafter(time, -math.inf))
        simulated.submit(each, time)
    return events + drain(simulated)


def first_token(events: Iterable[EngineEvent], request_id: str = "r") -> EngineEvent:
    return one(events, request_id, EventKind.FIRST_TOKEN)


def finished(events: Iterable[EngineEvent], request_id: str = "r") -> EngineEvent:
    return one(events, request_id, EventKind.FINISHED)


def one(events: Iterable[EngineEvent], request_id: str, kind: EventKind) -> EngineEvent:
    (event,) = [e for e in events if e.request_id == request_id and e.kind is kind]
    return event


def mixed_arrivals(num_calls: int, *, seed: int = 1) -> list[tuple[float, EngineRequest]]:
    """More work than a small server has room for, some of it urgent, most with shared prefixes."""
    rng, now, arrivals = random.Random(seed), 0.0, []
    for i in range(num_calls):
        now += rng.expovariate(4.0)
        arrivals.append(
            (
                now,
                call(
                    f"r{i}",
                    prompt=rng.randrange(200, 1500),
                    output=rng.randrange(1, 120),
                    prefix=(part(rng.choice("st"), 150),),
                    deadline=now + rng.choice([2.0, 10.0, 300.0]),
                    workflow_id=f"w{i % 7}",
                    service_s=1.0,
                ),
            )
        )
    return arrivals


def vllm_request(token_ids: list[int], block_hasher: Any) -> Request:
    return Request("r", token_ids, SamplingParams(), None, block_hasher=block_hasher)


def block_hashes_of_vllm(token_ids: list[int], block_size: int) -> list[Any]:
    init_none_hash(sha256)
    hasher = get_request_block_hasher(block_size, sha256)
    return vllm_request(token_ids, hasher).block_hashes


def prefill_s(*chunks: int, num_cached_tokens: int = 0) -> float:
    """Duration of the steps that compute one prompt in these chunks and nothing else."""
    total_s, num_computed = 0.0, num_cached_tokens
    for chunk in chunks:
        attention = prefill_attention(chunk, num_computed)
        total_s += LATENCY.step_s(num_prefill_tokens=chunk, prefill_attention=attention)
        num_computed += chunk
    return total_s


def decode_s(*contexts: int) -> float:
    """Duration of one step per given context, each decoding one sequence."""
    return sum(LATENCY.step_s(num_decode_seqs=1, num_kv_tokens=c) for c in contexts)


def approx(seconds: float) -> Any:
    return pytest.approx(seconds, rel=1e-12)
