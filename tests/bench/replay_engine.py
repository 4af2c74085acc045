"""A vLLM server of a real socket that answers with as many tokens as it is asked for."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from tests.fakes import listening


@dataclass(frozen=True)
class Call:
    """A completion as it arrived."""

    headers: Mapping[str, str]
    body: dict[str, Any]

    @property
    def run(self) -> str:
        return self.headers["X-Workflow-Id"]

    @property
    def stage(self) -> str:
        return self.headers["X-Workflow-Stage"]

    @property
    def name(self) -> str:
        """Name of the call within its run."""
        return self.headers["X-Request-Id"].removeprefix(f"{self.run}-")

    @property
    def prompt(self) -> list[int]:
        return list(self.body["prompt"])


@dataclass(kw_only=True)
class ReplayEngine:
    """Answers like vLLM; `received` and `ended` say in which order calls came and went."""

    instance: str = "one"
    num_extra_tokens: int = 0
    """Tokens that every answer has too many."""
    fails: Callable[[Call], bool] = lambda call: False
    """Which calls get a status 500."""
    breaks_off: bool = False
    """Streams end after their first token."""
    says: bytes = b""
    """The whole body of every answer, in place of tokens."""
    models: list[str] = field(default_factory=lambda: ["m"])
    held: bool = False
    """Calls wait for `let_go`."""
    tokenizes: bool = True
    emulated_late_share: float | None = None
    """None for a server without an emulated GPU."""
    time_scale: str = "1"
    facts: dict[str, Any] = field(default_factory=dict)
    """What `/health` says."""

    received: list[Call] = field(default_factory=list)
    ended: list[Call] = field(default_factory=list)
    url: str = ""
    num_aborted: int = 0
    _gates: dict[str, asyncio.Event] = field(default_factory=dict)
    _polled: asyncio.Event = field(default_factory=asyncio.Event)
    _changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    def let_go(self, name: str) -> None:
        """Answer the call of that name, now or when it comes."""
        self._gate(name).set()

    async def wait_for(self, *, received: int = 0, aborted: int = 0) -> None:
        async with asyncio.timeout(10), self._changed:
            await self._changed.wait_for(
                lambda: len(self.received) >= received and self.num_aborted >= aborted
            )

    async def wait_for_poll(self) -> None:
        """Wait until somebody asks for the models."""
        self._polled.clear()
        async with asyncio.timeout(10):
            await self._polled.wait()

    def calls(self, run: str = "") -> list[Call]:
        return [call for call in self.received if call.run.endswith(run)]

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[ReplayEngine]:
        app = web.Application(client_max_size=1 << 30)
        app.router.add_get("/v1/models", self._on_models)
        app.router.add_get("/health", self._on_health)
        app.router.add_get("/version", self._on_version)
        app.router.add_get("/metrics", self._on_metrics)
        app.router.add_post("/tokenize", self._on_tokenize)
        app.router.add_post("/v1/completions", self._on_call)
        async with listening(app) as self.url:
            yield self

    def _gate(self, name: str) -> asyncio.Event:
        return self._gates.setdefault(name, asyncio.Event())

    async def _on_models(self, request: web.Request) -> web.Response:
        self._polled.set()
        return web.json_response(
            {"object": "list", "data": [{"id": name, "object": "model"} for name in self.models]}
        )

    async def _on_health(self, request: web.Request) -> web.Response:
        return web.json_response(self.facts)

    async def _on_version(self, request: web.Request) -> web.Response:
        return web.json_response({"version": "0.32.0"})

    async def _on_tokenize(self, request: web.Request) -> web.Response:
        if not self.tokenizes:
            return web.json_response({"error": "no"}, status=404)
        return web.json_response({"tokens": list(range(300, 800))})

    async def _on_metrics(self, request: web.Request) -> web.Response:
        if self.emulated_late_share is None:
            return web.Response(text="")
        busy_s = 1.0 + len(self.ended)
        return web.Response(
            text=f'vllm_workflow:emulated_gpu_info{{gpu="X",time_scale="{self.time_scale}"}} 1\n'
            f"vllm_workflow:emulated_steps_total 7\n"
            f"vllm_workflow:emulated_busy_seconds_total {busy_s}\n"
            f"vllm_workflow:emulated_late_seconds_total {busy_s * self.emulated_late_share}\n"
        )

    async def _on_call(self, request: web.Request) -> web.StreamResponse:
        call = Call(request.headers, await request.json())
        num_cached = self._num_cached(call)
        async with self._changed:
            self.received.append(call)
            self._changed.notify_all()
        try:
            return await self._answer(request, call, num_cached)
        except (asyncio.CancelledError, ConnectionResetError):
            self.num_aborted += 1
            raise
        finally:
            async with self._changed:
                self._changed.notify_all()

    def _num_cached(self, call: Call) -> int:
        return max((num_shared(call.prompt, other.prompt) for other in self.received), default=0)

    async def _answer(
        self, request: web.Request, call: Call, num_cached: int
    ) -> web.StreamResponse:
        if self.held:
            await self._gate(call.name).wait()
        if self.fails(call):
            return web.json_response({"error": {"message": "scripted"}}, status=500)
        xargs = call.body.get("vllm_xargs", {})
        wanted = xargs.get("emulated_num_output_tokens", call.body["max_tokens"])
        num_tokens = wanted + self.num_extra_tokens
        response = web.StreamResponse(
            headers={"Content-Type": "text/event-stream", "X-Workflow-Instance": self.instance}
        )
        await response.prepare(request)
        if self.says:
            await response.write(self.says)
            return response
        for i in range(num_tokens):
            await response.write(_event({"choices": [{"index": 0, "text": f"t{i}"}]}))
            if self.breaks_off:
                return response
        usage = {
            "prompt_tokens": len(call.prompt),
            "completion_tokens": num_tokens,
            "prompt_tokens_details": {"cached_tokens": num_cached},
        }
        await response.write(_event({"choices": [], "usage": usage}) + b"data: [DONE]\n\n")
        self.ended.append(call)
        return response


def num_shared(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the longest common prefix."""
    pairs = enumerate(zip(one, other))
    return next((n for n, (a, b) in pairs if a != b), min(len(one), len(other)))


def _event(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data).encode() + b"\n\n"
