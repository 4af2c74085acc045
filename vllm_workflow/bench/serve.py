"""Loads an OpenAI-compatible server with runs, and says what came of it."""

from __future__ import annotations

import json
import math
import platform
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from types import MappingProxyType
from typing import Any

from tqdm import tqdm

from vllm_workflow.bench.completions import Answer, complete, new_session
from vllm_workflow.bench.identity import CallContext, Identity
from vllm_workflow.bench.prompts import Prompts
from vllm_workflow.bench.records import RunRecord
from vllm_workflow.bench.replay import PlannedRun, replay
from vllm_workflow.bench.results import METRICS, TABLE_PERCENTILES, summarize, to_json_value
from vllm_workflow.bench.target import Target, emulated_gpu
from vllm_workflow.bench.validity import Validity, judge
from vllm_workflow.core.errors import ConfigError
from vllm_workflow.emulation.lateness import Lateness

OUTPUT_LENGTHS = ("exact", "hidden")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """How a server is loaded and what is reported; names as the flags of `vllm bench serve`."""

    base_url: str = "http://127.0.0.1:8000"
    endpoint: str = "/v1/completions"
    backend: str = "openai"
    model: str = ""
    """Empty for the first that the server lists."""
    header: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    extra_body: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    request_id_prefix: str = ""
    """Before each run's name at the server, and the salt of prompts; empty for one that no other
    load has, so that this one finds nothing of others in the servers' caches."""
    identity: Identity = field(default_factory=Identity)
    output_length: str = "exact"
    """`exact`: `max_tokens` is the trace's length, and the end-of-sequence token is ignored.
    `hidden`: `max_tokens` says nothing of it; only an emulated GPU knows when to stop."""
    max_tokens: int = 4096
    """With `hidden`: of every call."""
    vocab_size: int | None = None
    """None to ask the server for tokens."""
    words: tuple[str, ...] = ()
    """Prompts are texts of these, one token each at the server; empty: prompts are token ids."""
    max_concurrency: int | None = None
    time_scale: float = 1.0
    """Of emulated GPUs, see `replay`."""
    call_timeout_s: float = 3600.0
    """By the wall clock."""
    ready_check_timeout_sec: float = 0.0
    emulated_servers: tuple[str, ...] = ()
    """Roots of the servers behind whose GPUs are emulated."""
    percentile_metrics: tuple[str, ...] = METRICS
    metric_percentiles: tuple[float, ...] = TABLE_PERCENTILES
    goodput: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    """Metric to milliseconds; empty: a run is good that met its SLO."""
    disable_tqdm: bool = False

    def __post_init__(self) -> None:
        if self.output_length not in OUTPUT_LENGTHS:
            raise ConfigError(
                f"output length: expected one of {list(OUTPUT_LENGTHS)}, got {self.output_length!r}"
            )
        if self.max_concurrency is not None and self.max_concurrency < 1:
            raise ConfigError(f"max concurrency: expected at least 1, got {self.max_concurrency}")
        if not self.call_timeout_s > 0:
            raise ConfigError(f"call timeout: expected above 0 s, got {self.call_timeout_s}")
        if not 0 < self.time_scale < math.inf:
            raise ConfigError(f"time scale: expected a number above 0, got {self.time_scale}")
        if self.max_tokens < 1:
            raise ConfigError(f"max tokens: expected at least 1, got {self.max_tokens}")
        if not self.endpoint.startswith("/"):
            raise ConfigError(
                f"endpoint: expected a path like /v1/completions, got {self.endpoint}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeResult:
    """What came of a load."""

    figures: Mapping[str, Any]
    """See `results.summarize`."""
    validity: Validity
    facts: Mapping[str, Any]
    """What the server said of itself, and with what it was measured."""
    model: str
    runs: tuple[RunRecord, ...]


async def serve(
    options: ServeOptions, runs: Sequence[PlannedRun], warmups: Sequence[PlannedRun] = ()
) -> ServeResult:
    """Replay `runs` against a server.

    Args:
        options: How.
        runs: With arrivals.
        warmups: Replayed before, all at once, and not reported.

    Raises:
        ConfigError: No usable URL.
        UpstreamError: The server does not say what it must be asked; calls that fail do not raise.
    """
    async with new_session(options.call_timeout_s, options.header) as session:
        target = Target(options.base_url, session)
        emulated = [Target(url, session) for url in options.emulated_servers]
        await target.wait_ready(options.ready_check_timeout_sec)
        model = options.model or await target.first_model()
        prefix = options.request_id_prefix or f"bench-{uuid.uuid4().hex[:8]}-"
        prompts = await _prompts(options, target, model, prefix)
        sender = _Sender(options, model, prompts, session, target.root + options.endpoint)
        if warmups:
            await replay(
                warmups,
                sender.send,
                id_prefix=f"{prefix}warmup-",
                time_scale=options.time_scale,
            )
        before = [await server.emulation_metrics() for server in emulated]
        gpus = {server.root: emulated_gpu(text) for server, text in zip(emulated, before)}
        _check_time_scale(gpus, options.time_scale)
        clocks = time.monotonic(), time.process_time()
        records = await _with_progress(options, runs, sender.send, prefix)
        wall_s, cpu_s = time.monotonic() - clocks[0], time.process_time() - clocks[1]
        lateness = {
            server.root: Lateness.between(then, await server.metrics())
            for server, then in zip(emulated, before)
        }
        facts = await target.facts() | {"request_id_prefix": prefix}
        for server in emulated:
            gpus[server.root] |= await server.facts()
    if gpus:
        facts["emulated_gpus"] = gpus
    return _result(options, records, lateness, cpu_s / wall_s if wall_s > 0 else 0.0, facts, model)


async def _prompts(options: ServeOptions, target: Target, model: str, prefix: str) -> Prompts:
    if options.words:
        return Prompts.of_words(options.words, prefix)
    if options.vocab_size is None:
        return await target.prompts(model, prefix)
    return Prompts.of_vocabulary(options.vocab_size, prefix)


def _check_time_scale(gpus: Mapping[str, Mapping[str, str]], time_scale: float) -> None:
    for url, gpu in gpus.items():
        if float(gpu.get("time_scale", time_scale)) != time_scale:
            raise ConfigError(
                f"{url} emulates its GPU at a time scale of {gpu['time_scale']}; expected the "
                f"load's, {time_scale:g}"
            )


def _result(
    options: ServeOptions,
    records: Sequence[RunRecord],
    lateness: Mapping[str, Lateness],
    cpu_share: float,
    facts: Mapping[str, Any],
    model: str,
) -> ServeResult:
    figures = summarize(
        records,
        percentile_metrics=options.percentile_metrics,
        percentiles=options.metric_percentiles,
        goodput_ms=options.goodput,
    )
    return ServeResult(
        figures=figures,
        validity=judge(records, cpu_share=cpu_share, emulated=lateness),
        facts={
            **facts,
            **_versions(),
            "fidelity_level": 3 if lateness else None,
            "time_scale": options.time_scale,
        },
        model=model,
        runs=tuple(records),
    )


async def _with_progress(
    options: ServeOptions,
    runs: Sequence[PlannedRun],
    send: Callable[[CallContext], Awaitable[Answer]],
    prefix: str,
) -> list[RunRecord]:
    with tqdm(total=len(runs), unit="run", disable=options.disable_tqdm) as bar:
        num_failed = 0

        def on_end(record: RunRecord) -> None:
            nonlocal num_failed
            num_failed += not record.finished
            if num_failed:
                bar.set_postfix(failed=num_failed, refresh=False)
            bar.update()

        return await replay(
            runs,
            send,
            id_prefix=prefix,
            max_concurrency=options.max_concurrency,
            time_scale=options.time_scale,
            on_end=on_end,
        )


class _Sender:
    """Turns calls of a trace into HTTP requests."""

    def __init__(
        self, options: ServeOptions, model: str, prompts: Prompts, session: Any, url: str
    ) -> None:
        self._options = options
        self._model = model
        self._prompts = prompts
        self._session = session
        self._url = url

    async def send(self, context: CallContext) -> Answer:
        body = self._body(context)
        return await complete(
            self._session, self._url, body, self._options.identity.to_headers(context)
        )

    def _body(self, context: CallContext) -> bytes:
        options = self._options
        num_output_tokens = max(1, context.call.num_output_tokens)
        xargs = options.identity.to_xargs(context)
        body: dict[str, Any] = {
            "model": self._model,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if options.output_length == "exact":
            body |= {"max_tokens": num_output_tokens, "ignore_eos": True}
        else:
            body["max_tokens"] = options.max_tokens
            xargs["emulated_num_output_tokens"] = num_output_tokens
        body |= options.extra_body
        if xargs:
            body["vllm_xargs"] = {**xargs, **body.get("vllm_xargs", {})}
        # The prompt is most of the body and already in the form it is sent in.
        prompt = self._prompts.json_prompt(context.run.run_id, context.call)
        return b'{"prompt":' + prompt + b"," + json.dumps(body).encode()[1:]


def document(
    result: ServeResult,
    options: ServeOptions,
    *,
    num_prompts: int,
    request_rate: float | None,
    burstiness: float,
    label: str | None = None,
    metadata: Mapping[str, str] = MappingProxyType({}),
    conditions: Mapping[str, Any] = MappingProxyType({}),
    detailed: bool = False,
) -> dict[str, Any]:
    """Return the result as it is saved: keys of `vllm bench serve` first, see `results`.

    Args:
        result: Of `serve`.
        options: It was made with.
        num_prompts: Runs.
        request_rate: Runs per second; None where the trace's own arrivals were kept.
        burstiness: Of the arrivals.
        label: In place of the backend's name.
        metadata: Further keys of the user's.
        conditions: For `meta`: trace, seed, flags, SLO.
        detailed: With every call of every run.
    """
    values: dict[str, Any] = {
        "date": datetime.now(UTC).astimezone().strftime("%Y%m%d-%H%M%S"),
        "endpoint_type": options.backend,
        "backend": options.backend,
        "label": label,
        "model_id": result.model,
        "tokenizer_id": None,
        "num_prompts": num_prompts,
        **metadata,
        "request_rate": "trace" if request_rate is None else request_rate,
        "burstiness": burstiness,
        "max_concurrency": options.max_concurrency,
        **result.figures,
        "valid": result.validity.is_valid,
        "invalid_reasons": list(result.validity.reasons),
        "generator": result.validity.generator,
        "emulated_servers": result.validity.emulated_servers,
        "meta": {**result.facts, **conditions},
    }
    if detailed:
        values["runs"] = [_run_values(run) for run in result.runs]
    json_values: dict[str, Any] = to_json_value(values)
    return json_values


def _run_values(run: RunRecord) -> dict[str, Any]:
    return {
        "run_id": run.run_id,
        "workflow": run.workflow,
        "tenant": run.tenant,
        "arrival_s": run.arrival_s,
        "end_s": run.end_s,
        "slo_s": run.slo_s,
        "reference_s": run.reference_s,
        "finished": run.finished,
        "met_slo": run.met_slo,
        "calls": [
            {
                "call_id": call.call_id,
                "stage": call.stage,
                "instance": call.instance,
                "planned_s": call.planned_s,
                "sent_s": call.sent_s,
                "first_token_s": call.first_token_s,
                "end_s": call.end_s,
                "num_prompt_tokens": call.num_prompt_tokens,
                "num_output_tokens": call.num_output_tokens,
                "num_cached_tokens": call.num_cached_tokens,
                "status": call.status,
                "error": call.error,
            }
            for call in run.calls
        ],
    }


def _versions() -> dict[str, str]:
    found = {"python_version": platform.python_version(), "platform": platform.platform()}
    try:
        found["vllm_workflow_version"] = version("vllm-workflow")
    except PackageNotFoundError:
        found["vllm_workflow_version"] = "not installed"
    return found
