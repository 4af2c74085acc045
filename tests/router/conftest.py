"""A router in front of fake engines."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import aiohttp
import pytest

from tests.fakes import FakeEngine
from vllm_workflow.router.app import Router, serve
from vllm_workflow.router.config import RouterConfig

CHAT = "/v1/chat/completions"


@dataclass
class Client:
    """Somebody who calls the router."""

    router: Router
    session: aiohttp.ClientSession

    def post(
        self,
        body: Any = None,
        *,
        path: str = CHAT,
        headers: dict[str, str] | None = None,
        **fields: Any,
    ) -> Any:
        """Call with a small valid body, `fields` added, or with `body` as it is."""
        if body is None:
            body = {"model": "m", "messages": [], **fields}
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} | (headers or {})
        return self.session.post(self.router.url + path, data=BytesIO(raw), headers=headers)

    def get(self, path: str) -> Any:
        return self.session.get(self.router.url + path)

    async def metric(self, name: str, **labels: str) -> float | None:
        return self.router.metrics.registry.get_sample_value(
            f"vllm_workflow:router_{name}", labels or None
        )


@asynccontextmanager
async def _routing(
    *engines: FakeEngine | str, seats: int | None = None, within_s: float = 60.0, **config: Any
) -> AsyncIterator[Client]:
    instances = [
        {"id": "abcdefgh"[i], "url": e if isinstance(e, str) else e.url}
        | ({"models": ["m"]} if isinstance(e, str) else {})
        | ({"max_num_seqs": seats} if seats else {})
        for i, e in enumerate(engines)
    ]
    data = {"port": 0, "shutdown_grace_s": 0.5, "instances": instances, **config}
    async with (
        asyncio.timeout(within_s),
        serve(RouterConfig.from_mapping(data, source="test")) as router,
        aiohttp.ClientSession() as session,
    ):
        yield Client(router, session)
        assert router.dispatcher.num_in_flight == 0
        assert router.dispatcher.fleet.num_outstanding() == 0


Routing = Callable[..., AbstractAsyncContextManager[Client]]


@pytest.fixture(autouse=True)
def no_exception_stays() -> Iterator[None]:
    """What is compiled must not go on handling an exception for ever: it would keep all that the
    exception knows, and be kept by the next one as its context."""
    yield
    assert sys.exception() is None


@pytest.fixture
def routing() -> Routing:
    """Start a router in front of engines or URLs; at its end, no reservation may be left."""
    return _routing


async def until(holds: Callable[[], bool | Awaitable[bool]]) -> None:
    """Wait until something holds; the test's own timeout ends it."""
    async with asyncio.timeout(60):
        while True:
            result = holds()
            if result if isinstance(result, bool) else await result:
                return
            await asyncio.sleep(0.02)


def healthy(client: Client) -> set[str]:
    upstreams = client.router.upstreams
    return {u.config.id for u in upstreams if upstreams.is_healthy(u)}


def names(client: Client) -> set[str]:
    return {upstream.config.id for upstream in client.router.upstreams}


async def answered_by(client: Client, headers: dict[str, str] | None = None, **fields: Any) -> str:
    async with client.post(headers=headers, **fields) as response:
        assert response.status == 200, await response.text()
        return str(response.headers["X-Workflow-Instance"])


def port_of(engine: FakeEngine) -> int:
    return int(engine.url.rpartition(":")[2])
