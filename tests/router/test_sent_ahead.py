"""What clients send before they have the answer to what they sent before."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, suppress

import pytest

from tests.fakes import FakeEngine
from tests.router.conftest import Routing
from tests.router.wires import BODY, CHUNKED, HEALTH, post, wire

pytestmark = pytest.mark.anyio


async def test_what_is_sent_ahead_is_answered_in_its_turn(routing: Routing) -> None:
    async with FakeEngine(held=True).serving() as engine, routing(engine) as client:
        async with wire(client) as sent:
            sent.send(post(BODY) + post(b'{"model":"m","x":"%b"}' % (b"x" * 2_800)) * 20)
            await engine.wait_for(received=1)
            engine.release(21)
            for _ in range(21):
                assert (await sent.answer()).status == 200
        assert client.router.reload.listeners[-1].bodies.num_bytes == 0


@pytest.mark.parametrize(
    ("first", "ahead"),
    [
        (post(BODY), post(b"x" * 70_000)),
        (CHUNKED % (len(BODY), BODY), post(b"x" * 70_000)),
        (CHUNKED % (len(BODY), BODY), HEALTH * 18),
    ],
    ids=["plain, many bytes", "by aiohttp, many bytes", "by aiohttp, many requests"],
)
@pytest.mark.parametrize("together", [True, False])
async def test_who_sends_far_ahead_is_cut_off_and_so_is_seen_to_leave(
    routing: Routing, first: bytes, ahead: bytes, together: bool
) -> None:
    async with FakeEngine(held=True).serving() as engine, routing(engine) as client:
        async with wire(client) as sent:
            if not together:
                sent.send(first)
                await engine.wait_for(received=1)
                sent.send(ahead)
            else:
                sent.send(first + ahead)
            with suppress(ConnectionError):
                assert await sent.reader.read(1) == b""
        if not together:
            await engine.wait_for(aborted=1)
        async with asyncio.timeout(10):
            while client.router.dispatcher.num_in_flight:
                await asyncio.sleep(0.001)
        assert client.router.reload.listeners[-1].bodies.num_bytes == 0


async def test_requests_sent_ahead_of_one_for_aiohttp_are_answered_in_their_turn(
    routing: Routing,
) -> None:
    async with FakeEngine(held=True).serving() as engine, routing(engine) as client:
        async with wire(client) as sent:
            sent.send(CHUNKED % (len(BODY), BODY) + HEALTH * 15 + post(b"x" * 60_000))
            await engine.wait_for(received=1)
            engine.release(1)
            statuses = [(await sent.answer()).status for _ in range(17)]

    assert statuses == [200] * 16 + [400]


async def test_what_clients_send_ahead_counts_as_memory_of_bodies(routing: Routing) -> None:
    limits = {"max_bodies_mb": 1}
    ahead = post(b'{"model":"m","x":"%b"}' % (b"x" * 60_000))
    async with FakeEngine(held=True).serving() as engine, routing(engine, limits=limits) as client:
        bodies = client.router.reload.listeners[-1].bodies
        async with AsyncExitStack() as stack:
            wires = []
            for number in range(1, 21):  # of each, 60 kB are kept
                sent = await stack.enter_async_context(wire(client))
                sent.send(post(BODY))
                await engine.wait_for(received=number)
                wires.append(sent)
            ends = [asyncio.create_task(sent.reader.read(1)) for sent in wires]
            most = 0
            for sent in wires:
                sent.send(ahead)
            async with asyncio.timeout(20):
                while not any(end.done() for end in ends):
                    await asyncio.sleep(0)
                    most = max(most, bodies.num_bytes)
            for end in ends:
                end.cancel()
            await asyncio.gather(*ends, return_exceptions=True)
        async with asyncio.timeout(20):
            while bodies.num_bytes:
                await asyncio.sleep(0.001)
        engine.release(100)  # whatever those who have left took of it
        async with client.post() as response:
            assert response.status == 200

    assert 500_000 < most <= 1_000_000
