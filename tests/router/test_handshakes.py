"""TLS handshakes that do not end, and those that fail."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress

import aiohttp
import pytest

from tests.fakes import FakeEngine
from tests.router.conftest import CHAT, Routing, _routing
from tests.router.test_router_process import process
from tests.router.test_tls import Certificates, certificates, trusting
from tests.router.wires import BODY, post

__all__ = ["certificates"]  # a fixture

pytestmark = pytest.mark.anyio

Started = Callable[[Certificates, str, str], AbstractAsyncContextManager[str]]
BUSY = "{max_connections: 2, header_timeout_s: 3600}"


@asynccontextmanager
async def in_this_process(certificates: Certificates, url: str, limits: str) -> AsyncIterator[str]:
    """A router on asyncio's loop; yields its url."""
    words = limits.strip("{}").replace(",", "").split()
    given = {name.rstrip(":"): float(n) for name, n in zip(words[::2], words[1::2])}
    if "max_connections" in given:
        given["max_connections"] = int(given["max_connections"])
    async with _routing(url, tls=certificates.files, limits=given) as client:
        yield client.router.url


@asynccontextmanager
async def in_its_own(certificates: Certificates, url: str, limits: str) -> AsyncIterator[str]:
    """The same as a process of its own, which runs on uvloop."""
    path = certificates.folder / "router.yaml"
    path.write_text(
        "port: 0\ntls: {cert_file: cert.pem, key_file: key.pem}\n"
        f"limits: {limits}\ninstances: [{{url: '{url}', models: [m]}}]\n",
        "utf-8",
    )
    async with process("--config", str(path)) as (running, address), asyncio.timeout(60):
        yield address
        running.terminate()
        assert await running.wait() == 0


both = pytest.mark.parametrize("started", [in_this_process, in_its_own])


async def connected(url: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Return a connection on which nothing is said."""
    host, _, port = url.partition("://")[2].partition(":")
    return await asyncio.open_connection(host, int(port))


async def is_served(url: str, certificates: Certificates) -> bool:
    async with trusting(certificates.client()) as session:
        try:
            async with session.post(url + CHAT, data=BODY) as response:
                return response.status == 200
        except (aiohttp.ClientError, ssl.SSLError, ConnectionError):
            return False


async def ended(reader: asyncio.StreamReader) -> None:
    """Wait until the other side has ended a connection."""
    async with asyncio.timeout(20):
        with suppress(ConnectionError):
            while await reader.read(4096):
                pass


@both
async def test_who_connects_and_says_nothing_counts_as_a_connection(
    certificates: Certificates, started: Started
) -> None:
    async with FakeEngine().serving() as engine, started(certificates, engine.url, BUSY) as url:
        silent = [await connected(url) for _ in range(2)]
        assert not await is_served(url, certificates)
        for _, writer in silent:
            writer.close()
        async with asyncio.timeout(20):
            while not await is_served(url, certificates):
                pass


@both
async def test_a_handshake_that_does_not_come_is_not_waited_for(
    certificates: Certificates, started: Started
) -> None:
    limits = "{header_timeout_s: 0.5}"
    async with FakeEngine().serving() as engine, started(certificates, engine.url, limits) as url:
        reader, writer = await connected(url)
        await ended(reader)
        writer.close()
        async with asyncio.timeout(20):
            while not await is_served(url, certificates):
                pass  # its own handshake may have come late


@both
async def test_a_router_that_stops_waits_for_no_handshake(
    certificates: Certificates, started: Started
) -> None:
    async with FakeEngine().serving() as engine:
        async with started(certificates, engine.url, BUSY) as url:
            reader, writer = await connected(url)
            assert await is_served(url, certificates)  # so it is taken by now
        await ended(reader)
        writer.close()


@both
async def test_junk_in_the_place_of_a_handshake_hurts_nobody(
    certificates: Certificates, started: Started
) -> None:
    async with FakeEngine().serving() as engine, started(certificates, engine.url, BUSY) as url:
        for junk in (b"", b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\xff\xff" + b"\0" * 70_000):
            reader, writer = await connected(url)
            writer.write(junk)
            with suppress(ConnectionError):
                writer.write_eof()
            await ended(reader)
            writer.close()
            async with asyncio.timeout(20):
                while not await is_served(url, certificates):
                    pass


async def test_a_call_that_comes_with_the_end_of_its_handshake_is_answered(
    routing: Routing, certificates: Certificates
) -> None:
    async with FakeEngine().serving() as engine:
        async with routing(engine, tls=certificates.files) as client:
            host, _, port = client.router.url.partition("://")[2].partition(":")
            incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
            tls = certificates.client().wrap_bio(incoming, outgoing, server_hostname=host)
            reader, writer = await asyncio.open_connection(host, int(port))
            while True:
                try:
                    tls.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    writer.write(outgoing.read())
                    incoming.write(await reader.read(65_536))
            tls.write(post(BODY))
            writer.write(outgoing.read())  # what ends the handshake is in the same packet
            answer = b""
            while b"\r\n\r\n" not in answer:
                incoming.write(await reader.read(65_536))
                with suppress(ssl.SSLWantReadError):
                    answer += tls.read(65_536)
            writer.close()

    assert answer.startswith(b"HTTP/1.1 200 OK")
