"""What clients may take of the router's memory and time, however they try."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest

from tests.fakes import FakeEngine
from tests.router.conftest import CHAT, Routing
from tests.router.raw_http import Answer, exchange, post, still_serves
from tests.router.test_router_process import process

pytestmark = pytest.mark.anyio


async def test_a_body_that_is_announced_as_too_large_is_not_read(routing: Routing) -> None:
    async with FakeEngine().serving() as engine, routing(engine, max_body_mb=1) as client:
        head = post(b"Content-Length: 100000000", body=b"", length=False)
        answer = await exchange(client.router.url, head)
        await still_serves(client)

    assert answer.status == 413
    assert answer.error["message"] == "body: expected at most 1 MB, got 100.0 MB"


async def chunked(num_bytes: int) -> AsyncIterator[bytes]:
    for _ in range(num_bytes // 65_536 + 1):
        yield b" " * 65_536


async def test_a_body_that_grows_too_large_is_refused_when_it_does(routing: Routing) -> None:
    async with FakeEngine().serving() as engine, routing(engine, max_body_mb=1) as client:
        url = client.router.url + CHAT
        async with client.session.post(url, data=chunked(2_000_000)) as response:
            assert response.status == 413
        await still_serves(client)


async def test_a_small_body_that_unpacks_to_a_large_one_is_refused(routing: Routing) -> None:
    import zlib

    bomb = zlib.compress(b" " * 50_000_000)
    async with FakeEngine().serving() as engine, routing(engine, max_body_mb=1) as client:
        async with client.post(bomb, headers={"Content-Encoding": "deflate"}) as response:
            assert response.status == 413
        async with client.post(b"no", headers={"Content-Encoding": "gzip"}) as response:
            assert response.status == 400
            assert "body: expected one as its headers announce it" in await response.text()
        await still_serves(client)


async def test_bodies_of_all_calls_together_take_bounded_memory(routing: Routing) -> None:
    limits = {"max_bodies_mb": 1}
    engine = FakeEngine(held=True)
    async with engine.serving(), routing(engine, limits=limits) as client:
        raw = b'{"model":"m","messages":["' + b"a" * 600_000 + b'"]}'
        first = asyncio.create_task(client.post(raw).__aenter__())
        await engine.wait_for(received=1)
        async with client.post(raw) as response:
            error = (await response.json())["error"]
            assert (response.status, error["code"]) == (429, "overloaded")
            assert response.headers["Retry-After"] == "1"
        engine.release()
        async with await first as response:
            assert response.status == 200
        engine.release()
        async with client.post(raw) as response:
            assert response.status == 200


@pytest.mark.parametrize("sent", [b"", b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\n"])
async def test_headers_that_do_not_come_are_not_waited_for(routing: Routing, sent: bytes) -> None:
    limits = {"header_timeout_s": 0.2, "idle_timeout_s": 0.3}
    async with FakeEngine().serving() as engine, routing(engine, limits=limits) as client:
        answer = await exchange(client.router.url, sent)
        await still_serves(client)

    if sent:
        assert answer.status == 408
        assert answer.error["code"] == "header_timeout"
    else:
        assert answer.status == 0


async def test_headers_that_come_byte_by_byte_are_not_waited_for(routing: Routing) -> None:
    limits = {"header_timeout_s": 0.3}
    async with FakeEngine().serving() as engine, routing(engine, limits=limits) as client:
        host, _, port = client.router.url.partition("://")[2].partition(":")
        reader, writer = await asyncio.open_connection(host, int(port))

        async def drip() -> None:
            writer.write(f"POST {CHAT} HTTP/1.1\r\n".encode())
            while not writer.is_closing():
                writer.write(b"X: a\r\n")
                await asyncio.sleep(0.05)

        dripping = asyncio.create_task(drip())
        async with asyncio.timeout(5):
            answer = Answer(await reader.read())
        dripping.cancel()
        writer.close()
        await still_serves(client)

    assert answer.status == 408


async def test_a_body_that_does_not_come_is_not_waited_for(routing: Routing) -> None:
    limits = {"body_timeout_s": 0.2}
    async with FakeEngine().serving() as engine, routing(engine, limits=limits) as client:
        head = post(b"Content-Length: 100", body=b"", length=False).replace(b": close", b": x")
        host, _, port = client.router.url.partition("://")[2].partition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(head + b"{")
        async with asyncio.timeout(5):
            raw = await reader.readuntil(b"}}")
        writer.close()
        await still_serves(client)

    answer = Answer(raw)
    assert answer.status == 408
    assert answer.error["message"] == "body: expected all of it within 0.2 s, got 1 bytes"


async def test_more_connections_than_there_may_be_are_turned_away(routing: Routing) -> None:
    limits = {"max_connections": 2}
    async with FakeEngine().serving() as engine, routing(engine, limits=limits) as client:
        host, _, port = client.router.url.partition("://")[2].partition(":")
        held = [await asyncio.open_connection(host, int(port)) for _ in range(2)]
        answer = await exchange(client.router.url, b"")
        for _, writer in held:
            writer.close()
            await writer.wait_closed()
        async with asyncio.timeout(5):
            while (await exchange(client.router.url, post())).status != 200:
                pass

    assert (answer.status, answer.error["code"]) == (503, "overloaded")


async def test_an_idle_connection_is_closed(routing: Routing) -> None:
    limits = {"idle_timeout_s": 0.2}
    async with FakeEngine().serving() as engine, routing(engine, limits=limits) as client:
        kept = post().replace(b"Connection: close", b"Connection: keep-alive")
        answer = await exchange(client.router.url, kept)

    assert answer.status == 200


def rss_mb(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text("ascii").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise AssertionError("no VmRSS")


@asynccontextmanager
async def watched(pid: int) -> AsyncIterator[list[float]]:
    """Note the memory of a process again and again while the block runs."""
    seen = [rss_mb(pid)]

    async def look() -> None:
        while True:
            seen.append(rss_mb(pid))
            await asyncio.sleep(0.05)

    looking = asyncio.create_task(look())
    try:
        yield seen
    finally:
        looking.cancel()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
async def test_twenty_clients_with_100_mb_each_take_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "router.yaml"
    async with FakeEngine().serving() as engine, aiohttp.ClientSession() as session:
        path.write_text(
            f"port: 0\nlimits: {{max_bodies_mb: 100}}\ninstances: [{{url: '{engine.url}'}}]\n"
        )
        async with process("--config", str(path)) as (running, url), asyncio.timeout(60):
            piece = b" " * (1 << 20)

            async def attack() -> int:
                async def body() -> AsyncIterator[bytes]:
                    for _ in range(100):
                        yield piece

                try:
                    async with session.post(url + CHAT, data=body()) as response:
                        return response.status
                except aiohttp.ClientError:  # it was closed on us
                    return 0

            async with watched(running.pid) as seen:
                statuses = await asyncio.gather(*(attack() for _ in range(20)))
            async with session.post(url + CHAT, json={}) as response:
                assert response.status == 200

    assert set(statuses) <= {0, 413, 429}
    assert {413, 429} & set(statuses)
    assert max(seen) - seen[0] < 300, seen
