"""The router as a server: its routes, and its life from start to stop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

from vllm_workflow.core.dispatcher import Dispatcher
from vllm_workflow.core.fleet import Fleet
from vllm_workflow.router.admin import Admin
from vllm_workflow.router.auth import Access, KeyCheck
from vllm_workflow.router.binder import Binder
from vllm_workflow.router.board import Board
from vllm_workflow.router.config import RouterConfig
from vllm_workflow.router.dashboard import Dashboard
from vllm_workflow.router.decision_log import DecisionLog
from vllm_workflow.router.discovery import Discovery, sources
from vllm_workflow.router.exchange import Handle
from vllm_workflow.router.keeper import Keeper
from vllm_workflow.router.limits import Bodies
from vllm_workflow.router.metrics import Metrics
from vllm_workflow.router.pool import CONNECT_TIMEOUT_S, KEEPALIVE_S
from vllm_workflow.router.protocol import Listener
from vllm_workflow.router.proxy import Proxy
from vllm_workflow.router.recorder import recorder
from vllm_workflow.router.reload import Reloader
from vllm_workflow.router.routes import Routes, check_operator
from vllm_workflow.router.store import Store
from vllm_workflow.router.tenants import TenantMetrics
from vllm_workflow.router.tuning import PolicyFile, PolicySwitch, Tuning
from vllm_workflow.router.upstreams import Upstreams

_EXPIRE_EVERY_S = 5.0


@dataclass(frozen=True, slots=True)
class Router:
    """A running router."""

    url: str
    admin_url: str
    """Empty if there is no port for operators."""
    dispatcher: Dispatcher
    upstreams: Upstreams
    proxy: Proxy
    metrics: Metrics
    reload: Reloader
    app: web.Application
    """What clients ask."""


@asynccontextmanager
async def serve(
    config: RouterConfig, read: Callable[[], RouterConfig] | None = None
) -> AsyncIterator[Router]:
    """Run a router while the block runs; then let calls under way end, and stop.

    Instances that do not answer at the start are taken in when they do.

    Args:
        config: As the router starts.
        read: Reads it again for a reload; None if it does not come from a file.

    Raises:
        ConfigError: The address is taken, or a file named in `config` cannot be used.
    """
    log = DecisionLog(Path(config.decision_log)) if config.decision_log else None
    store = Store(Path(config.store.path), config.store.retention) if config.store else None
    board = Board() if config.dashboard else None
    tracing = config.tracing.build() if config.tracing else None
    watching = [each.record for each in (log, board, tracing) if each is not None]
    dispatcher = Dispatcher(
        Fleet(),
        config.policy_config(),
        [workflow.build() for workflow in config.workflows],
        record=recorder(watching, store, config.store),
        tenants=config.tenants_config(),
    )
    metrics = Metrics()
    if dispatcher.tenants is not None:
        metrics.tenants = TenantMetrics(dispatcher.tenants, metrics.registry)
    async with AsyncExitStack() as stack:
        if store:
            stack.push_async_callback(asyncio.to_thread, store.close)
            metrics.count_store(store)
        if log:
            stack.callback(log.flush)
        if tracing:
            stack.push_async_callback(asyncio.to_thread, tracing.close)
        session = await stack.enter_async_context(_session())
        binder = Binder(dispatcher)
        metrics.count_held(
            lambda: dispatcher.waiting.num_held, lambda: dispatcher.waiting.num_relegated
        )
        metrics.count_waiting(lambda: len(dispatcher.waiting) + binder.num_stranded)
        metrics.count_predictions(dispatcher.predictor.num_predicted)
        upstreams = Upstreams(
            config.instances,
            dispatcher,
            session,
            metrics,
            binder.instances_changed,
            reads_load=config.read_load,
        )
        stack.callback(upstreams.close)
        access = Access(config.auth)
        bodies = Bodies(config.max_body_mb, config.limits)
        proxy = Proxy(
            dispatcher,
            binder,
            upstreams,
            metrics,
            access=access,
            bodies=bodies,
            max_wait_s=config.max_wait_s,
            set_priority=config.set_priority,
            log_prompts=config.log_prompts,
            tracing=tracing,
        )
        tls = config.tls.context() if config.tls else None
        reload = Reloader(
            config, read, access=access, bodies=bodies, proxy=proxy, upstreams=upstreams, tls=tls
        )
        discovery = _discovery(config, session, upstreams)
        await discovery.look()
        keeper = Keeper(dispatcher, store) if store else None
        if keeper:
            keeper.restore()
        await upstreams.probe_all()
        watchers = [
            upstreams.run(),
            discovery.run(),
            _expire_runs(proxy),
            *(each.run() for each in (log, keeper) if each),
        ]
        watchers += _tuning(config, PolicySwitch(dispatcher, binder, metrics), store)
        await stack.enter_async_context(_beside(*watchers))
        operator = KeyCheck(config.admin.hashed()) if config.admin else None
        admin_url = ""
        if config.admin and operator:
            admin = Admin(operator, dispatcher, upstreams, bodies, metrics, reload)
            listener = _listener(admin.build(), config, reload)
            admin_url = await stack.enter_async_context(
                listener.listening(
                    config.admin.host, config.admin.port, tls, where="admin.host, admin.port"
                )
            )
        routes = Routes(
            proxy,
            upstreams,
            metrics,
            access,
            operator,
            more=_dashboard(board, dispatcher, upstreams, access, operator),
        )
        app = routes.build()
        listener = _listener(app, config, reload, routes.calls())
        url = await stack.enter_async_context(listener.listening(config.host, config.port, tls))
        yield Router(url, admin_url, dispatcher, upstreams, proxy, metrics, reload, app)


def _tuning(
    config: RouterConfig, switch: PolicySwitch, store: Store | None
) -> list[Coroutine[Any, Any, None]]:
    """Return what tunes while the router runs; nothing where that is switched off."""
    if config.tuner is None or config.tuned_log is None:
        return []
    file = PolicyFile(Path(config.tuner.policy_file), switch)
    workflows = [workflow.build() for workflow in config.workflows]
    log = Path(config.tuned_log)
    tuning = Tuning(config.tuner, log, switch, file, workflows=workflows, store=store)
    return [file.run(), tuning.run()]


def _discovery(
    config: RouterConfig, session: aiohttp.ClientSession, upstreams: Upstreams
) -> Discovery:
    found = sources(config.discovery, session) if config.discovery else []
    return Discovery(found, upstreams)


def _dashboard(
    board: Board | None,
    dispatcher: Dispatcher,
    upstreams: Upstreams,
    access: Access,
    operator: KeyCheck | None,
) -> Callable[[web.Application], None]:
    if board is None:
        return lambda app: None
    check = partial(check_operator, access=access, operator=operator)
    return Dashboard(board, dispatcher, upstreams, check).add_to


def _listener(
    app: web.Application,
    config: RouterConfig,
    reload: Reloader,
    calls: Mapping[str, Handle] | None = None,
) -> Listener:
    listener = Listener(app, config.limits, grace_s=config.shutdown_grace_s, calls=calls)
    reload.listeners.append(listener)
    return listener


async def _expire_runs(proxy: Proxy) -> None:
    """End idle runs now and then until cancelled."""
    while True:
        await asyncio.sleep(_EXPIRE_EVERY_S)
        proxy.runs.expire(time.monotonic())


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


def _session() -> aiohttp.ClientSession:
    """Return what asks instances how they are; calls have connections of their own, see `Pool`."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S),
        auto_decompress=False,
        cookie_jar=aiohttp.DummyCookieJar(),
    )
