"""The router as a server: its routes, and its life from start to stop."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

from vllm_workflow.core.dispatcher import Dispatcher
from vllm_workflow.core.errors import ConfigError
from vllm_workflow.core.fleet import Fleet
from vllm_workflow.router.binder import Binder
from vllm_workflow.router.config import RouterConfig
from vllm_workflow.router.decision_log import DecisionLog
from vllm_workflow.router.errors import error_response
from vllm_workflow.router.forward import Sessions
from vllm_workflow.router.metrics import Metrics
from vllm_workflow.router.proxy import Proxy
from vllm_workflow.router.upstreams import Upstreams

GENERATION_PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
EMBEDDING_PATHS = ("/v1/embeddings",)
_CONNECT_TIMEOUT_S = 5.0
_KEEPALIVE_S = 3.0
"""Below the 5 s after which vLLM closes a kept connection, so that no call meets the closing."""
_EXPIRE_EVERY_S = 5.0


@dataclass(frozen=True, slots=True)
class Router:
    """A running router."""

    url: str
    dispatcher: Dispatcher
    upstreams: Upstreams
    proxy: Proxy
    metrics: Metrics

    async def _models(self, request: web.Request) -> web.Response:
        cards = {
            card["id"]: card
            for upstream in self.upstreams
            if self.upstreams.is_healthy(upstream)
            for card in upstream.model_cards()
        }
        return web.json_response({"object": "list", "data": list(cards.values())})

    async def _health(self, request: web.Request) -> web.Response:
        """Tell whether any instance is healthy; how busy they are does not matter."""
        healthy = {u.config.id: self.upstreams.is_healthy(u) for u in self.upstreams}
        return web.json_response(
            {"instances": healthy}, status=200 if any(healthy.values()) else 503
        )

    async def _metrics(self, request: web.Request) -> web.Response:
        return web.Response(
            body=self.metrics.exposition(),
            headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"},
        )

    def build_app(self, max_body_bytes: int) -> web.Application:
        """Make the application; one router has one."""
        app = web.Application(client_max_size=max_body_bytes, logger=logging.getLogger(__name__))
        for path in GENERATION_PATHS:
            app.router.add_post(path, partial(self.proxy.handle, takes_xargs=True))
        for path in EMBEDDING_PATHS:
            app.router.add_post(path, partial(self.proxy.handle, takes_xargs=False))
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/health", self._health)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_route("*", "/{path:.*}", _not_found)
        return app

    async def expire_runs(self) -> None:
        """End idle runs now and then until cancelled."""
        while True:
            await asyncio.sleep(_EXPIRE_EVERY_S)
            self.proxy.runs.expire(time.monotonic())


async def _not_found(request: web.Request) -> web.Response:
    return error_response(404, f"{request.method} {request.path!a:.256} is not known here")


@asynccontextmanager
async def serve(config: RouterConfig) -> AsyncIterator[Router]:
    """Run a router while the block runs; then let calls under way end, and stop.

    Instances that do not answer at the start are taken in when they do.

    Raises:
        ConfigError: The address is taken, or a file named in `config` cannot be used.
    """
    log = DecisionLog(Path(config.decision_log)) if config.decision_log else None
    dispatcher = Dispatcher(
        Fleet(),
        config.policy_config(),
        [workflow.build() for workflow in config.workflows],
        record=log.record if log else None,
    )
    metrics = Metrics()
    async with AsyncExitStack() as stack:
        if log:
            stack.callback(log.flush)
        session = await stack.enter_async_context(_session())
        fresh = await stack.enter_async_context(_session(keep=False))
        binder = Binder(dispatcher)
        metrics.count_waiting(lambda: len(dispatcher.waiting) + binder.num_stranded)
        upstreams = Upstreams(
            config.instances, dispatcher, session, metrics, binder.instances_changed
        )
        proxy = Proxy(
            dispatcher,
            binder,
            upstreams,
            Sessions(session, fresh),
            metrics,
            max_wait_s=config.max_wait_s,
            set_priority=config.set_priority,
        )
        await upstreams.probe_all()
        router = Router("", dispatcher, upstreams, proxy, metrics)
        watchers = [upstreams.run(), router.expire_runs(), *([log.run()] if log else [])]
        await stack.enter_async_context(_beside(*watchers))
        url = await stack.enter_async_context(_listening(router, config))
        yield Router(url, dispatcher, upstreams, proxy, metrics)


@asynccontextmanager
async def _beside(*coroutines: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run coroutines while the block runs; if one fails, so does the block, by its error."""
    block = asyncio.current_task()
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]

    def stop_if_failed(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() and block:
            block.cancel()

    for task in tasks:
        task.add_done_callback(stop_if_failed)
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(result, Exception):
                raise result


@asynccontextmanager
async def _listening(router: Router, config: RouterConfig) -> AsyncIterator[str]:
    runner = web.AppRunner(
        router.build_app(int(config.max_body_mb * 1e6)),
        handler_cancellation=True,
        access_log=None,
        shutdown_timeout=config.shutdown_grace_s,
    )
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, config.host, config.port, backlog=1024).start()
        except OSError as e:
            raise ConfigError(
                f"host, port: cannot listen on {config.host}:{config.port}: {e.strerror}"
            ) from None
        host, port = runner.addresses[0][:2]
        yield f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    finally:
        await runner.cleanup()


def _session(*, keep: bool = True) -> aiohttp.ClientSession:
    """Return what makes connections, and keeps them for the next call or not."""
    connector = aiohttp.TCPConnector(
        limit=0, keepalive_timeout=_KEEPALIVE_S if keep else None, force_close=not keep
    )
    return aiohttp.ClientSession(
        connector=connector,
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_TIMEOUT_S),
        auto_decompress=False,
        cookie_jar=aiohttp.DummyCookieJar(),
    )
