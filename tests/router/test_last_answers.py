"""Connections that end: whose clients are slow, and when the router stops."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from tests.fakes import FakeEngine
from tests.router.conftest import Client, Routing
from tests.router.wires import BODY, post, wire
from vllm_workflow.router.plain_connection import PlainConnection

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def slow_wire(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[socket.socket, PlainConnection]]:
    """A connection on which little is under way at a time, and what reads it in the router."""
    made: list[PlainConnection] = []
    connection_made = PlainConnection.connection_made

    def noted(self: PlainConnection, transport: asyncio.BaseTransport) -> None:
        made.append(self)
        taken: socket.socket = transport.get_extra_info("socket")
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
        connection_made(self, transport)

    monkeypatch.setattr(PlainConnection, "connection_made", noted)
    host, _, port = client.router.url.removeprefix("http://").partition(":")
    with socket.socket() as sent:
        sent.setblocking(False)
        sent.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
        async with asyncio.timeout(20):
            await asyncio.get_running_loop().sock_connect(sent, (host, int(port)))
            while not made:
                await asyncio.sleep(0)
            yield sent, made[0]


async def test_a_router_that_stops_lets_slow_clients_have_the_end_of_their_answers(
    routing: Routing, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = asyncio.get_running_loop()
    async with FakeEngine(num_tokens=60_000).serving() as engine, AsyncExitStack() as stack:
        client = await stack.enter_async_context(routing(engine, shutdown_grace_s=15))
        async with slow_wire(client, monkeypatch) as (sent, connection):
            await loop.sock_sendall(sent, post(BODY))
            while (
                connection._transport is None or not connection._transport.get_write_buffer_size()
            ):
                await asyncio.sleep(0.001)
            stopping = asyncio.create_task(stack.aclose())
            while not connection.is_ending:
                await asyncio.sleep(0.001)
            received = bytearray()
            while piece := await loop.sock_recv(sent, 4096):
                received += piece
            await stopping

    head, _, body = bytes(received).partition(b"\r\n\r\n")
    assert b"Content-Length: %d" % len(body) in head


async def test_a_connection_that_is_made_when_the_router_stops_is_ended(routing: Routing) -> None:
    loop = asyncio.get_running_loop()
    engine = FakeEngine(held=True)
    async with engine.serving(), routing(engine, shutdown_grace_s=30) as client:
        listener = client.router.reload.listeners[-1]
        async with wire(client) as sent:
            sent.send(post(BODY))
            await engine.wait_for(received=1)
            stopping = asyncio.create_task(listener._end_connections())
            while not listener.is_ending:
                await asyncio.sleep(0)
            # As one that was accepted already, of which the loop tells only now.
            ours, theirs = socket.socketpair()
            with ours, theirs:
                ours.setblocking(False)
                await loop.connect_accepted_socket(listener._protocol, theirs)
                assert await loop.sock_recv(ours, 1) == b""
                assert not stopping.done()
            engine.release()
            assert (await sent.answer()).status == 200
            await stopping


@pytest.mark.parametrize("header", [b"X: plain", b"TE: for-aiohttp"])
async def test_a_client_that_does_not_take_its_last_answer_does_not_stay(
    routing: Routing, monkeypatch: pytest.MonkeyPatch, header: bytes
) -> None:
    limits = {"write_timeout_s": 0.2}
    loop = asyncio.get_running_loop()
    async with (
        FakeEngine(num_tokens=60_000).serving() as engine,
        routing(engine, limits=limits) as client,
        slow_wire(client, monkeypatch) as (sent, connection),
    ):
        await loop.sock_sendall(sent, post(BODY, b"Connection: close", header))
        while client.router.reload.listeners[-1].num_connections:
            assert not connection.is_write_paused
            await asyncio.sleep(0.01)
