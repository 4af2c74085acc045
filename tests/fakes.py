"""A vLLM server made of a real socket and a script."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.aiohttp import make_aiohttp_handler

USAGE = {
    "prompt_tokens": 100,
    "completion_tokens": 3,
    "total_tokens": 103,
    "prompt_tokens_details": {"cached_tokens": 40},
}


@dataclass(frozen=True)
class Received:
    """One request as it arrived."""

    path: str
    headers: list[tuple[str, str]]
    raw: bytes

    @property
    def body(self) -> dict[str, Any]:
        return dict(json.loads(self.raw))

    @property
    def xargs(self) -> dict[str, Any]:
        return dict(self.body.get("vllm_xargs", {}))

    def header(self, name: str) -> str | None:
        return next((v for k, v in self.headers if k.lower() == name.lower()), None)


@asynccontextmanager
async def listening(
    app: web.Application, port: int = 0, *, tls: ssl.SSLContext | None = None
) -> AsyncIterator[str]:
    """Have an application answer on this machine, on any port if it is 0; yields the url."""
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", port, ssl_context=tls).start()
        yield "{}://{}:{}".format("https" if tls else "http", *runner.addresses[0][:2])
    finally:
        await runner.cleanup()


@dataclass(kw_only=True)
class FakeEngine:
    """Answers like an OpenAI-compatible server, as told by its fields.

    `received`, `num_aborted` and `answering` say what happened; `wait_for` waits until they do.
    """

    models: tuple[str, ...] = ("m",)
    num_tokens: int = 3
    status: int = 200
    """Of every answer; other than 200 it is an error at once."""
    error_headers: dict[str, str] = field(default_factory=dict)
    held: bool = False
    """Each token, and an answer that is no stream, waits for `release`."""
    early_headers: bool = True
    """Headers of a stream go out before the first token, as vLLM's do."""
    dies_after: int | None = None
    """Closes the connection after so many tokens."""
    last_words: bytes = b""
    """Sent just before it dies."""
    pieces: tuple[bytes, ...] = ()
    """Every stream, as it is sent piece by piece, in the place of the tokens."""
    compresses: bool = False
    location: str = ""
    """Redirects every call there."""
    health: int = 200
    slow_health: bool = False
    """`/health` is not answered until it is set back, all else is."""
    num_health_asks: int = 0
    card_bytes: bytes | None = None
    """Of `/v1/models`, in the place of `models`."""
    card_type: str = "application/json"
    """Content-Type of these."""
    num_card_asks: int = 0
    api_key: str = ""
    """If given, every request must bring it, but for `open_paths`."""
    open_paths: tuple[str, ...] = ()
    load: tuple[int, float] | None = None
    """Calls and share of the KV cache that `/metrics` tells of, as vLLM does; None: not found."""
    tells_own_load: bool = False
    """`/metrics` tells of the calls that it is answering."""
    num_kv_blocks: int | None = None
    """That `/metrics` tells of, of 16 tokens each."""
    silent: bool = False
    """Accepts connections and never answers anything, like a stopped process."""

    forgets: bool = False
    """Keeps no requests, for those who send many."""

    received: list[Received] = field(default_factory=list)
    num_aborted: int = 0
    num_answering: int = 0
    url: str = ""
    _tokens: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(0))
    _changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    def release(self, num_tokens: int = 1) -> None:
        for _ in range(num_tokens):
            self._tokens.release()

    async def wait_for(self, *, received: int = 0, aborted: int = 0) -> None:
        """Wait until so many requests have arrived and so many were aborted."""
        async with asyncio.timeout(30), self._changed:
            await self._changed.wait_for(
                lambda: len(self.received) >= received and self.num_aborted >= aborted
            )

    @asynccontextmanager
    async def serving(
        self, port: int = 0, *, tls: ssl.SSLContext | None = None
    ) -> AsyncIterator[FakeEngine]:
        app = web.Application(client_max_size=1 << 30, middlewares=[self._check_key])
        app.router.add_get("/health", self._on_health)
        app.router.add_get("/v1/models", self._on_models)
        app.router.add_get("/metrics", self._on_metrics)
        app.router.add_post("/v1/{endpoint:.*}", self._on_call)
        async with listening(app, port, tls=tls) as self.url:
            yield self

    @web.middleware
    async def _check_key(self, request: web.Request, handler: Any) -> web.StreamResponse:
        if request.path in self.open_paths:
            return await handler(request)  # type: ignore[no-any-return]
        if self.api_key and request.headers.get("Authorization") != f"Bearer {self.api_key}":
            return web.json_response({"error": "Unauthorized"}, status=401)
        answer: web.StreamResponse = await handler(request)
        return answer

    async def _on_health(self, request: web.Request) -> web.Response:
        self.num_health_asks += 1
        if self.silent:
            await asyncio.Event().wait()
        while self.slow_health:
            await asyncio.sleep(0.01)
        return web.Response(status=self.health)

    async def _on_models(self, request: web.Request) -> web.Response:
        self.num_card_asks += 1
        if self.card_bytes is not None:
            return web.Response(body=self.card_bytes, headers={"Content-Type": self.card_type})
        return web.json_response(
            {"object": "list", "data": [{"id": m, "object": "model"} for m in self.models]}
        )

    async def _on_metrics(self, request: web.Request) -> web.Response:
        load = (self.num_answering, 0.0) if self.tells_own_load else self.load
        if load is None:
            return web.Response(status=404)
        registry = CollectorRegistry()
        for name, value in (
            ("num_requests_running", load[0]),
            ("num_requests_waiting", 0),
            ("kv_cache_usage_perc", load[1]),
        ):
            gauge = Gauge(f"vllm:{name}", name, ["engine", "model_name"], registry=registry)
            gauge.labels("0", "m").set(value)
        if self.num_kv_blocks is not None:
            names = ["block_size", "engine", "num_gpu_blocks"]
            info = Gauge("vllm:cache_config_info", "info", names, registry=registry)
            info.labels("16", "0", str(self.num_kv_blocks)).set(1)
        # As vLLM does, this compresses for whoever accepts it.
        return await make_aiohttp_handler(registry)(request)

    async def _on_call(self, request: web.Request) -> web.StreamResponse:
        raw = await request.read()
        await self._note(Received(request.raw_path, list(request.headers.items()), raw))
        self.num_answering += 1
        try:
            return await self._answer(request, json.loads(raw))
        except (asyncio.CancelledError, ConnectionResetError):
            self.num_aborted += 1
            raise
        finally:
            self.num_answering -= 1
            await asyncio.shield(self._note())

    async def _note(self, received: Received | None = None) -> None:
        async with self._changed:
            if received and not self.forgets:
                self.received.append(received)
            self._changed.notify_all()

    async def _answer(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        if self.silent:
            await asyncio.Event().wait()
        if self.location:
            raise web.HTTPTemporaryRedirect(self.location)
        if self.status != 200:
            error = {"error": {"message": "scripted", "type": "fake", "code": self.status}}
            return web.json_response(error, status=self.status, headers=self.error_headers)
        if body.get("stream"):
            return await self._stream(request, body)
        await self._pace()
        if self.dies_after is not None:
            return self._die(request)
        choice = {"index": 0, "message": {"role": "assistant", "content": "t" * self.num_tokens}}
        response = web.json_response(
            {"id": "x", "object": "chat.completion", "created": 0, "model": "m"}
            | {"choices": [choice | {"finish_reason": "stop"}], "usage": USAGE}
        )
        if self.compresses:
            response.enable_compression(web.ContentCoding.gzip)
        return response

    async def _stream(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        if self.early_headers:
            await response.prepare(request)
            await response.write(b"")
        if self.pieces:
            await response.prepare(request)
            for piece in self.pieces:
                await response.write(piece)
            return response
        for i in range(self.num_tokens):
            if self.dies_after == i:
                if self.last_words:
                    await response.write(self.last_words)
                return self._die(request, response)
            await self._pace()
            if not response.prepared:
                await response.prepare(request)
            delta = {"index": 0, "delta": {"content": f"t{i}"}, "finish_reason": None}
            await response.write(_event(_chunk(choices=[delta])))
        options = body.get("stream_options")
        if isinstance(options, dict) and options.get("include_usage"):
            await response.write(_event(_chunk(choices=[], usage=USAGE)))
        if request.path == "/v1/responses":  # which has an end of its own
            last = {"type": "response.completed", "response": {"usage": USAGE}}
            await response.write(b"event: response.completed\n" + _event(last))
        else:
            await response.write(b"data: [DONE]\n\n")
        return response

    async def _pace(self) -> None:
        if self.held:
            await self._tokens.acquire()

    def _die(
        self, request: web.Request, response: web.StreamResponse | None = None
    ) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.close()
        return response or web.Response()


def _chunk(**fields: Any) -> dict[str, Any]:
    return {"id": "x", "object": "chat.completion.chunk", "created": 0, "model": "m", **fields}


def _event(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data).encode() + b"\n\n"
