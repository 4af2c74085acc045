"""The router as a server: its routes, and its life from start to stop."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial

import aiohttp
from aiohttp import web

from vllm_workflow.core.dispatcher import Dispatcher
from vllm_workflow.router.admin import Admin
from vllm_workflow.router.auth import KeyCheck
from vllm_workflow.router.background import beside
from vllm_workflow.router.config import RouterConfig
from vllm_workflow.router.dashboard import Dashboard
from vllm_workflow.router.health import Health
from vllm_workflow.router.listener import Listener
from vllm_workflow.router.metrics import Metrics
from vllm_workflow.router.names import Names
from vllm_workflow.router.parts import Parts, build
from vllm_workflow.router.pool import CONNECT_TIMEOUT_S, KEEPALIVE_S
from vllm_workflow.router.proxy import Proxy
from vllm_workflow.router.records import recording
from vllm_workflow.router.reload import Reloader
from vllm_workflow.router.routes import Routes, check_operator
from vllm_workflow.router.tls import RenewableTls
from vllm_workflow.router.upstreams import Upstreams


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
    health: Health

    def leave(self) -> float:
        """Tell load balancers to send calls elsewhere; returns the seconds they are given."""
        self.health.is_leaving = True
        return self.reload.config.shutdown_delay_s


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
    async with AsyncExitStack() as stack:
        records = await stack.enter_async_context(recording(config))
        names = Names()
        session = await stack.enter_async_context(_session(names))
        parts = build(config, records, session, names)
        stack.callback(parts.upstreams.close)
        await parts.begin()
        await stack.enter_async_context(beside(*parts.watchers()))
        tls = RenewableTls(config.tls.context()) if config.tls else None
        reload = Reloader(config, read, parts, tls)
        stack.push_async_callback(reload.end)
        admin_url = ""
        if config.admin and parts.operator:
            app = _admin(parts, parts.operator, reload)
            listener = _for_operators(app, config, parts, tls)
            reload.listeners.append(listener)
            admin_url = await stack.enter_async_context(
                listener.listening(
                    config.admin.host, config.admin.port, where="admin.host, admin.port"
                )
            )
        routes = _routes(parts)
        app = routes.build()
        listener = _for_clients(app, routes, config, parts, tls)
        reload.listeners.append(listener)
        url = await stack.enter_async_context(listener.listening(config.host, config.port))
        yield Router(
            url,
            admin_url,
            parts.dispatcher,
            parts.upstreams,
            parts.proxy,
            parts.metrics,
            reload,
            app,
            routes.health,
        )


def _for_operators(
    app: web.Application, config: RouterConfig, parts: Parts, tls: RenewableTls | None
) -> Listener:
    grace_s = config.shutdown_grace_s
    return Listener(app, config.limits, parts.bodies, tls, grace_s=grace_s)


def _for_clients(
    app: web.Application,
    routes: Routes,
    config: RouterConfig,
    parts: Parts,
    tls: RenewableTls | None,
) -> Listener:
    return Listener(
        app,
        config.limits,
        parts.bodies,
        tls,
        grace_s=config.shutdown_grace_s,
        calls=routes.calls(),
        hand_over=parts.proxy.hand_over,
    )


def _admin(parts: Parts, operator: KeyCheck, reload: Reloader) -> web.Application:
    return Admin(
        operator, parts.dispatcher, parts.upstreams, parts.bodies, parts.metrics, reload
    ).build()


def _routes(parts: Parts) -> Routes:
    def add_dashboard(app: web.Application) -> None:
        board, access, operator = parts.records.board, parts.access, parts.operator
        if board is not None:
            check = partial(check_operator, access=access, operator=operator)
            Dashboard(board, parts.dispatcher, parts.upstreams, check).add_to(app)

    return Routes(
        parts.proxy, parts.upstreams, parts.metrics, parts.access, parts.operator, add_dashboard
    )


def _session(names: Names) -> aiohttp.ClientSession:
    """Return what asks instances how they are; calls have connections of their own, see `Pool`."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(
            limit=0, keepalive_timeout=KEEPALIVE_S, resolver=names, use_dns_cache=False
        ),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S),
        auto_decompress=False,
        cookie_jar=aiohttp.DummyCookieJar(),
    )
