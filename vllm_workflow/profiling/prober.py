"""Measures a live server and fits its latency profile."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

import aiohttp

from vllm_workflow.core.errors import UpstreamError
from vllm_workflow.core.fit import Observation, StepLoad, evaluate, fit
from vllm_workflow.core.hardware import Deployment
from vllm_workflow.core.latency import LatencyModel, prefill_attention
from vllm_workflow.core.windows import RequestTiming, decode_windows
from vllm_workflow.profiles.profile import LatencyProfile
from vllm_workflow.profiling.plan import Limits, Probe, plan
from vllm_workflow.profiling.server import Server, ServerFacts, TimedCall

_KEEPALIVE_S = 3.0
"""Below the 5 s after which vLLM closes a kept connection: a long batch leaves some idle."""


@dataclass(slots=True)
class Measured:
    """What the probes gave so far."""

    ttfts: dict[Probe, list[TimedCall]] = field(default_factory=dict)
    batches: list[tuple[RequestTiming, ...]] = field(default_factory=list)
    num_skipped: int = 0
    """Probes that time did not suffice for."""

    def add(self, probe: Probe, calls: Sequence[TimedCall]) -> None:
        if not probe.recorded:
            return
        if probe.measures_prefill:
            self.ttfts.setdefault(probe, []).extend(calls)
        else:
            self.batches.append(tuple(call.timing for call in calls))

    def prefill_observations(self, max_num_batched_tokens: int) -> list[Observation]:
        """One per prompt size: the fastest repeat, for a disturbance only adds."""
        return [
            _ttft_observation(min(calls, key=_ttft_s), max_num_batched_tokens)
            for calls in self.ttfts.values()
        ]

    def decode_observations(self, max_num_batched_tokens: int) -> list[Observation]:
        """Three per batch, else the large batches would be all that counts."""
        found = []
        for batch in self.batches:
            some = {0, len(batch) // 2, len(batch) - 1}
            found += decode_windows(
                batch,
                max_num_batched_tokens=max_num_batched_tokens,
                targets=[batch[i] for i in sorted(some)],
            )
        return found


async def measure(
    base_url: str,
    *,
    model: str = "",
    limits: Limits | None = None,
    seed: int = 0,
    on_plan: Callable[[int], None] | None = None,
    on_probe: Callable[[], object] | None = None,
) -> tuple[ServerFacts, Measured]:
    """Probe a server that serves nobody else meanwhile.

    Args:
        base_url: Root of the server.
        model: Its name there; the first one listed if empty.
        limits: Of the load.
        seed: Of the random prompts.
        on_plan: Called with the number of probes before the first.
        on_probe: Called after each.

    Raises:
        UpstreamError: The server fails, is not a vLLM server, or is busy.
        ConfigError: Limits that leave nothing to measure.
    """
    limits = limits or Limits()
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEPALIVE_S)
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=10.0, sock_read=600.0)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        server = Server(base_url, session, model)
        facts = await server.facts()
        if facts.num_requests:
            raise UpstreamError(
                f"{server.root}: expected an idle server, got {facts.num_requests} requests on it"
            )
        tokens = facts.num_kv_blocks and facts.block_size and facts.num_kv_blocks * facts.block_size
        probes = plan(limits, max_model_len=facts.max_model_len, num_kv_tokens=tokens)
        measured, rng = Measured(), random.Random(seed)
        vocabulary = await server.vocabulary()
        if on_plan:
            on_plan(len(probes))
        end_time = time.monotonic() + limits.max_seconds
        for num_done, probe in enumerate(probes):
            if time.monotonic() > end_time:
                measured.num_skipped = len(probes) - num_done
                break
            measured.add(probe, await _run(probe, server, vocabulary, rng))
            if on_probe:
                on_probe()
    return facts, measured


def fitted_profile(
    facts: ServerFacts,
    measured: Measured,
    *,
    max_num_batched_tokens: int,
    deployment: Deployment | None = None,
) -> LatencyProfile:
    """Fit the model of one server.

    Args:
        facts: What the server says of itself.
        measured: What the probes gave.
        max_num_batched_tokens: As the server was started with; it does not tell.
        deployment: What runs there, for a prior where the probes say little.

    Raises:
        ConfigError: Too little was measured.
    """
    prior: LatencyModel | None = None
    if deployment:
        prior = deployment.latency(max_num_batched_tokens=max_num_batched_tokens)
    prefills = measured.prefill_observations(max_num_batched_tokens)
    decodes = measured.decode_observations(max_num_batched_tokens)
    fitted = fit(
        [*prefills, *decodes],
        prior,
        max_num_batched_tokens=max_num_batched_tokens,
    )
    residuals: dict[str, Mapping[str, float]] = {"all": fitted.residuals}
    for name, part in (("prefill", prefills), ("decode", decodes)):
        if part:
            residuals[name] = evaluate(part, fitted.latency, fitted.request_s).residuals
    profile = LatencyProfile(
        latency=fitted.latency,
        request_overhead_s=fitted.request_s,
        num_kv_blocks=facts.num_kv_blocks,
        block_size=facts.block_size,
        source="measured by vllm-workflow profile",
        conditions=_conditions(facts, measured),
        residuals=residuals,
    )
    if deployment is None:
        return profile
    return replace(
        profile,
        gpu=deployment.gpu.name,
        model_shape=deployment.shape.name,
        tp=deployment.tp,
        weight_bits=deployment.weight_bits,
    )


def _conditions(facts: ServerFacts, measured: Measured) -> dict[str, object]:
    return {
        "model": facts.model,
        "vllm_version": facts.version,
        "max_model_len": facts.max_model_len,
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "prompt_sizes": sorted(p.num_prompt_tokens for p in measured.ttfts),
        "batch_sizes": sorted({len(b) for b in measured.batches}),
        "num_probes_skipped": measured.num_skipped,
    }


async def _run(
    probe: Probe, server: Server, vocabulary: Sequence[int], rng: random.Random
) -> list[TimedCall]:
    """Start the requests of a probe one after another, so that each prefill has its own step."""
    tasks: list[asyncio.Task[TimedCall]] = []
    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(probe.num_seqs):
                prompt = rng.choices(vocabulary, k=probe.num_prompt_tokens)
                begun = asyncio.Event()
                call = server.complete(prompt, probe.num_output_tokens, begun.set)
                tasks.append(group.create_task(call))
                tasks[-1].add_done_callback(lambda _, begun=begun: begun.set())  # type: ignore[misc]
                await begun.wait()
    except ExceptionGroup as errors:
        # The requests of a probe fail for one reason; the first says it.
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


def _ttft_s(call: TimedCall) -> float:
    return call.timing.first_token_time - call.sent_time


def _ttft_observation(call: TimedCall, max_num_batched_tokens: int) -> Observation:
    timing, loads, done = call.timing, [], call.timing.num_cached_tokens
    while done < timing.num_prompt_tokens:
        chunk = min(timing.num_prompt_tokens - done, max_num_batched_tokens)
        loads.append(
            StepLoad(num_prefill_tokens=chunk, prefill_attention=prefill_attention(chunk, done))
        )
        done += chunk
    return Observation(seconds=_ttft_s(call), loads=tuple(loads) or (StepLoad(),), num_requests=1)
