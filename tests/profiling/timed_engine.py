"""A vLLM server on a real socket whose steps take the time that a latency model says."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from tests.fakes import listening
from vllm_workflow.core.latency import LatencyModel, prefill_attention

METRICS = """\
# HELP vllm:cache_config_info Information of the LLMEngine CacheConfig
# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{{block_size="16",engine="0",num_gpu_blocks="{blocks}",dtype="a,b\\"c"}} 1.0
vllm:num_requests_running{{engine="0",model_name="m"}} {running}
vllm:num_requests_waiting{{engine="0",model_name="m"}} 0.0
"""


@dataclass(eq=False)
class _Call:
    prompt: list[int]
    num_output_tokens: int
    tokens: asyncio.Queue[int] = field(default_factory=asyncio.Queue)
    num_computed: int = 0
    num_emitted: int = 0


@dataclass(kw_only=True)
class TimedEngine:
    """Batches continuously with chunked prefill. A late wake-up does not add up: the next
    step begins when the one before it should have ended."""

    latency: LatencyModel
    num_blocks: int = 4096
    max_model_len: int = 2048
    num_running: int = 0
    """Others' requests, as `/metrics` says."""
    status: int = 200
    """Of completions."""
    num_short: int = 0
    """Tokens that it stops early by."""
    prompts: list[list[int]] = field(default_factory=list)
    num_beside: int = 0
    """Most calls that ran side by side."""
    url: str = ""
    _calls: list[_Call] = field(default_factory=list)
    _arrived: asyncio.Event = field(default_factory=asyncio.Event)

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[TimedEngine]:
        app = web.Application()
        app.router.add_get("/v1/models", self._on_models)
        app.router.add_get("/version", self._on_version)
        app.router.add_get("/metrics", self._on_metrics)
        app.router.add_post("/tokenize", self._on_tokenize)
        app.router.add_post("/v1/completions", self._on_completion)
        async with listening(app) as self.url:
            engine = asyncio.create_task(self._run())
            try:
                yield self
            finally:
                engine.cancel()
                with suppress(asyncio.CancelledError):
                    await engine

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        end_time = 0.0
        while True:
            if not self._calls:
                self._arrived.clear()
                await self._arrived.wait()
                end_time = loop.time()
            scheduled, step_s = self._schedule()
            end_time += step_s
            await asyncio.sleep(end_time - loop.time())
            for call, num_tokens in scheduled:
                self._advance(call, num_tokens)

    def _schedule(self) -> tuple[list[tuple[_Call, int]], float]:
        budget = self.latency.max_num_batched_tokens
        num_prompt = num_seqs = num_kv = 0
        attention = 0.0
        scheduled = []
        self.num_beside = max(self.num_beside, len(self._calls))
        for call in self._calls:
            left = len(call.prompt) - call.num_computed
            num_tokens = min(left, budget) if left else 1
            if left:
                num_prompt += num_tokens
                attention += prefill_attention(num_tokens, call.num_computed)
            else:
                num_seqs += 1
                num_kv += len(call.prompt) + call.num_emitted
            budget -= num_tokens
            if num_tokens:
                scheduled.append((call, num_tokens))
        step_s = self.latency.step_s(
            num_prefill_tokens=num_prompt,
            num_decode_seqs=num_seqs,
            num_kv_tokens=num_kv,
            prefill_attention=attention,
        )
        return scheduled, step_s

    def _advance(self, call: _Call, num_tokens: int) -> None:
        if call.num_computed < len(call.prompt):
            call.num_computed += num_tokens
            if call.num_computed < len(call.prompt):
                return
        call.num_emitted += 1
        call.tokens.put_nowait(call.num_emitted)
        if call.num_emitted == call.num_output_tokens:
            self._calls.remove(call)

    async def _on_models(self, request: web.Request) -> web.Response:
        card = {"id": "m", "object": "model", "max_model_len": self.max_model_len}
        return web.json_response({"object": "list", "data": [card]})

    async def _on_version(self, request: web.Request) -> web.Response:
        return web.json_response({"version": "0.0.fake"})

    async def _on_metrics(self, request: web.Request) -> web.Response:
        return web.Response(text=METRICS.format(blocks=self.num_blocks, running=self.num_running))

    async def _on_tokenize(self, request: web.Request) -> web.Response:
        text = (await request.json())["prompt"]
        return web.json_response({"tokens": [ord(c) for c in text], "count": len(text)})

    async def _on_completion(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        if self.status != 200:
            return web.json_response({"error": {"message": "scripted"}}, status=self.status)
        assert body["ignore_eos"]
        assert body["min_tokens"] == body["max_tokens"]
        self.prompts.append(body["prompt"])
        call = _Call(body["prompt"], body["max_tokens"] - self.num_short)
        self._calls.append(call)
        self._arrived.set()
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for _ in range(call.num_output_tokens):
            await call.tokens.get()
            await response.write(_event(choices=[{"index": 0, "text": "t"}]))
        usage = {
            "prompt_tokens": len(call.prompt),
            "completion_tokens": call.num_output_tokens,
        }
        await response.write(_event(choices=[], usage=usage))
        await response.write(b"data: [DONE]\n\n")
        return response


def _event(**fields: Any) -> bytes:
    return b"data: " + json.dumps({"id": "x", "model": "m", **fields}).encode() + b"\n\n"
