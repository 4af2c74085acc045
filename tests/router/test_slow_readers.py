"""Clients slow to read, or that do not, on asyncio's loop and on the one routers run on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from tests.fakes import FakeEngine, listening
from tests.router.conftest import CHAT
from tests.router.test_router_process import process
from vllm_workflow.router.app import serve
from vllm_workflow.router.config import RouterConfig

pytestmark = pytest.mark.anyio


def write(path: Path, url: str, write_timeout_s: float) -> None:
    path.write_text(
        f"port: 0\nshutdown_grace_s: 0.5\nlimits: {{write_timeout_s: {write_timeout_s}}}\n"
        f"instances: [{{id: a, url: '{url}', models: [m]}}]\n",
        "utf-8",
    )


@asynccontextmanager
async def on_asyncio(path: Path) -> AsyncIterator[str]:
    """Run a router here; yields its url."""
    async with serve(RouterConfig.from_file(path)) as router:
        yield router.url


@asynccontextmanager
async def on_uvloop(path: Path) -> AsyncIterator[str]:
    """The same as a process of its own."""
    pytest.importorskip("uvloop")
    async with process("--config", str(path)) as (_, url):
        yield url


Started = Callable[[Path], AbstractAsyncContextManager[str]]
on_both_loops = pytest.mark.parametrize("started", [on_asyncio, on_uvloop])


@dataclass
class Talker:
    """An engine whose answers are longer than what sockets hold: 16 MB."""

    stream: bool
    done: asyncio.Event = field(default_factory=asyncio.Event)
    """An answer has ended, or was given up."""

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[str]:
        app = web.Application()
        app.router.add_get("/health", self._health)
        app.router.add_post(CHAT, self._answer)
        async with listening(app) as url:
            yield url

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        await request.read()
        kind = "text/event-stream" if self.stream else "application/json"
        response = web.StreamResponse(headers={"Content-Type": kind})
        await response.prepare(request)
        try:
            for _ in range(250):
                await response.write(b"data: " + b"x" * 65_536 + b"\n\n")
        finally:
            self.done.set()
        return response


@on_both_loops
@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_takes_nothing_of_its_answer_keeps_no_seat(
    tmp_path: Path, started: Started, stream: bool
) -> None:
    path, talker = tmp_path / "router.yaml", Talker(stream)
    async with talker.serving() as engine_url, asyncio.timeout(60):
        write(path, engine_url, 0.3)
        async with started(path) as url:
            host, _, port = url.partition("://")[2].partition(":")
            _, writer = await asyncio.open_connection(host, int(port), limit=1)
            body = b'{"model":"m","messages":[],"stream":%s}' % str(stream).lower().encode()
            head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
            writer.write(head.encode() + body)
            await talker.done.wait()
            while await in_flight(url):
                await asyncio.sleep(0.02)
            writer.transport.abort()


async def in_flight(url: str) -> float:
    """Calls that the router has at its instance."""
    async with aiohttp.ClientSession() as session, session.get(url + "/metrics") as response:
        for line in (await response.text()).splitlines():
            if line.startswith('vllm_workflow:router_requests_in_flight{instance="a"}'):
                return float(line.split()[-1])
    raise AssertionError("no such series")


@on_both_loops
async def test_a_client_that_reads_slowly_gets_all(tmp_path: Path, started: Started) -> None:
    path = tmp_path / "router.yaml"
    async with FakeEngine(num_tokens=2_000).serving() as engine, asyncio.timeout(120):
        write(path, engine.url, 5.0)
        async with started(path) as url, aiohttp.ClientSession() as session:
            async with session.post(url + CHAT, json={"stream": True}) as response:
                size, last = 0, b""
                while chunk := await response.content.read(2_000):
                    size, last = size + len(chunk), chunk
                    await asyncio.sleep(0.005)

    assert last.endswith(b"data: [DONE]\n\n")
    assert size > 100_000
