"""Plain calls, which are read without aiohttp, and how its connection becomes aiohttp's."""

from __future__ import annotations

import asyncio
import gc
import json
from contextlib import suppress
from typing import Any

import pytest

from tests.fakes import FakeEngine
from tests.router.conftest import CHAT, Routing
from tests.router.test_tls import Certificates, certificates
from tests.router.wires import BODY, HEALTH, LINE, STREAM, listener_of, post, wire
from vllm_workflow.router.call import Call
from vllm_workflow.router.exchange import Answer, Exchange
from vllm_workflow.router.listener import Listener
from vllm_workflow.router.plain import PlainExchange
from vllm_workflow.router.plain_connection import PlainConnection
from vllm_workflow.router.protocol import Protocol

__all__ = ["certificates"]  # a fixture

pytestmark = pytest.mark.anyio

SINGLETONS = (
    *(b"Content-Length", b"Content-Location", b"Content-Range", b"Content-Type", b"ETag"),
    *(b"Host", b"Max-Forwards", b"Server", b"Transfer-Encoding", b"User-Agent"),
)
"""Headers of which a request has one at most, by RFC 9110 and aiohttp."""


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[Protocol]:
    """What aiohttp has got connections by."""
    protocols: list[Protocol] = []
    aiohttp_protocol = Listener.aiohttp_protocol

    def noted(self: Listener, num_trusts: int) -> Protocol:
        protocols.append(aiohttp_protocol(self, num_trusts))
        return protocols[-1]

    monkeypatch.setattr(Listener, "aiohttp_protocol", noted)
    return protocols


@pytest.mark.parametrize("body", [BODY, STREAM, b"{", b'{"model":"no"}', b'{"model":1}'])
async def test_whoever_reads_a_call_its_answer_is_the_same(
    routing: Routing, taken: list[Protocol], body: bytes
) -> None:
    async with FakeEngine().serving() as engine, routing(engine) as client:
        answers = []
        for header in (b"X-Custom: 1", b"TE: trailers"):
            async with wire(client) as sent:
                sent.send(post(body, header, b"X-Request-Id: mine"))
                answers.append(await sent.answer())

    plain, other = answers
    assert len(taken) == 1
    assert plain.first == other.first
    assert plain.body == other.body
    changing = {"date", "server", "x-workflow-queue-ms"}
    assert {k: v for k, v in plain.headers.items() if k not in changing} == {
        k: v for k, v in other.headers.items() if k not in changing
    }
    assert "date" in plain.headers


async def test_wherever_packets_end_a_call_is_the_same(
    routing: Routing, taken: list[Protocol], monkeypatch: pytest.MonkeyPatch
) -> None:
    received: list[bytes] = []
    receive = PlainConnection.data_received

    def noted(self: PlainConnection, data: bytes) -> None:
        received.append(data)
        receive(self, data)

    monkeypatch.setattr(PlainConnection, "data_received", noted)
    raw = post('{"model":"m","user":"é"}'.encode(), b"X-Custom: 1")
    head_size = raw.index(b"\r\n\r\n") + 4
    ends = (1, 20, head_size - 2, head_size, head_size + 1, len(raw) - 1)
    async with FakeEngine().serving() as engine, routing(engine) as client:
        for end in ends:
            received.clear()
            async with wire(client) as sent:
                sent.send(raw[:end])
                while not received:
                    await asyncio.sleep(0.001)
                sent.send(raw[end:])
                assert (await sent.answer()).status == 200

    assert {each.raw for each in engine.received} == {raw[head_size:]}
    assert len(engine.received) == len(ends)
    assert len(taken) == 3  # of which the head did not come at once


async def test_calls_sent_at_once_are_answered_in_turn(
    routing: Routing, taken: list[Protocol]
) -> None:
    async with FakeEngine().serving() as engine, routing(engine) as client:
        async with wire(client) as sent:
            sent.send(post(BODY) + post(STREAM) + post(BODY) + HEALTH + post(BODY))
            kinds = [(await sent.answer()).headers["content-type"] for _ in range(5)]

    assert [kind.partition(";")[0] for kind in kinds] == [
        "application/json",
        "text/event-stream",
        "application/json",
        "application/json",
        "application/json",
    ]
    assert len(engine.received) == 4
    assert len(taken) == 1


async def test_a_connection_stays_for_the_next_call_unless_it_is_to_end(
    routing: Routing, taken: list[Protocol]
) -> None:
    async with FakeEngine().serving() as engine, routing(engine) as client:
        async with wire(client) as sent:
            for _ in range(3):
                sent.send(post(BODY))
                answer = await sent.answer()
                assert "connection" not in answer.headers
            sent.send(post(BODY, b"Connection: close"))
            assert (await sent.answer()).headers["connection"] == "close"
            assert await sent.reader.read() == b""

    assert taken == []
    assert len(engine.received) == 4


@pytest.mark.parametrize(
    "headers",
    [
        (b"Connection: keep-alive", b"Connection: close"),
        (b"Connection: close", b"connection: Keep-Alive"),
        (b"Connection: keep-alive, close",),
        (b"Connection: keep-alive", b"Connection: x, Close"),
    ],
    ids=lambda headers: b"; ".join(headers).decode(),
)
async def test_whoever_says_close_among_other_words_has_the_connection_closed(
    routing: Routing, headers: tuple[bytes, ...]
) -> None:
    async with FakeEngine().serving() as engine, routing(engine) as client:
        async with wire(client) as sent:
            sent.send(post(BODY, *headers))
            answer = await sent.answer()
            assert (answer.status, answer.headers["connection"]) == (200, "close")
            assert await sent.reader.read() == b""


@pytest.mark.parametrize(
    "data",
    [
        HEALTH,
        post(BODY)[:40],
        post(BODY).replace(b"HTTP/1.1", b"HTTP/1.0"),
        post(BODY).replace(CHAT.encode(), CHAT.encode() + b"?a=b"),
        post(BODY, b"Content-Length: 27"),
        post(BODY, b"Transfer-Encoding: chunked"),
        post(BODY, b"Expect: 100-continue"),
        post(BODY, b"Upgrade: h2c", b"Connection: Upgrade"),
        post(BODY, b"Connection: keep-alive, X-Custom"),
        post(BODY, b"Content-Encoding: gzip"),
        post(BODY, b"Host: another"),
        *(post(BODY, name + b": a", name + b": a") for name in SINGLETONS),
        post(BODY, b"X : a"),
        post(BODY, b" folded"),
        post(BODY, b"X: a\nY: b"),
        post(BODY, b"X: " + b"a" * 9000),
        post(BODY, *[b"X: a"] * 200),
        post(BODY).replace(b"Host: router\r\n", b""),
        post(BODY).replace(b"Content-Length: 27", b"Content-Length: 027000000"),
        post(BODY).replace(b"Content-Length: 27", "Content-Length: ٢٧".encode()),
        post(BODY).replace(b"Content-Length: 27\r\n", b""),
    ],
    ids=lambda data: repr(data)[:120],
)
async def test_what_is_not_plain_is_for_aiohttp_to_judge(
    routing: Routing, taken: list[Protocol], data: bytes
) -> None:
    async with FakeEngine().serving() as engine, routing(engine) as client:
        async with wire(client) as sent:
            sent.send(post(BODY))
            await sent.answer()
            assert taken == []
            sent.send(data)
            while not taken:
                await asyncio.sleep(0.001)
        async with client.post() as response:
            assert response.status == 200


@pytest.mark.parametrize("header", [b"X: plain", b"Idempotency-Key: k"])
@pytest.mark.parametrize("body", [BODY, STREAM])
async def test_of_a_call_whose_client_leaves_nothing_waits_for_the_garbage_collector(
    routing: Routing, body: bytes, header: bytes
) -> None:
    def kept() -> list[Any]:
        return [each for each in gc.get_objects() if type(each) in (PlainExchange, Call)]

    async with FakeEngine(held=True).serving() as engine, routing(engine) as client:
        gc.collect()  # those of other tests
        gc.disable()
        try:
            for number in range(1, 4):
                async with wire(client) as sent:
                    sent.send(post(body, header))
                    await engine.wait_for(received=number)
                    if number == 3:
                        engine.release(3)
                        await sent.answer()
                await engine.wait_for(aborted=min(number, 2))
            async with asyncio.timeout(20):
                while kept():
                    await asyncio.sleep(0.01)
        finally:
            gc.enable()


async def test_a_call_that_is_cancelled_by_others_ends_its_connection(
    routing: Routing, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with FakeEngine().serving() as engine, routing(engine) as client:

        async def cancelled(exchange: Exchange) -> Answer:
            raise asyncio.CancelledError

        monkeypatch.setattr(listener_of(client), "handles", {LINE: cancelled})
        async with wire(client) as sent:
            sent.send(post(BODY))
            with suppress(ConnectionResetError):
                assert await sent.reader.read() == b""


async def test_who_is_answered_before_the_body_is_told_that_it_is_the_last_answer(
    routing: Routing, taken: list[Protocol]
) -> None:
    data = post(BODY, b"X-Custom: \xff")
    async with FakeEngine().serving() as engine, routing(engine) as client:
        async with wire(client) as sent:
            sent.send(data[: -len(BODY)])
            answer = await sent.answer()
            assert (answer.status, answer.headers["connection"]) == (400, "close")
            sent.send(BODY)
            assert await sent.reader.read() == b""

    assert taken == []


async def test_nothing_is_kept_of_a_client_that_leaves_instead_of_sending_its_body(
    routing: Routing,
) -> None:
    async with FakeEngine().serving() as engine, routing(engine) as client:
        async with wire(client) as sent:
            sent.send(post(BODY, b"X-Custom: \xff")[: -len(BODY)])
            await sent.answer()
        gc.collect()  # those of other tests
        async with asyncio.timeout(30):
            while any(type(e) is PlainConnection for e in gc.get_objects()):
                await asyncio.sleep(0.05)


async def test_bytes_stay_in_their_order_when_aiohttp_gets_a_connection_with_tls(
    routing: Routing, taken: list[Protocol], certificates: Certificates
) -> None:
    large = b'{"model":"m","x":"%b"}' % b"".join(b"%09d " % i for i in range(100_000))
    async with (
        FakeEngine(held=True).serving() as engine,
        routing(engine, tls=certificates.files) as client,
    ):
        async with wire(client, tls=certificates.client()) as sent:
            second = post(large, b"TE: trailers")
            sent.send(post(BODY) + second[:60_000])
            await engine.wait_for(received=1)
            for _ in range(1_000):
                await asyncio.sleep(0)
            engine.release(2)
            assert (await sent.answer()).status == 200
            sent.send(second[60_000:])
            assert (await sent.answer()).status == 200

    assert len(taken) == 1
    assert engine.received[-1].raw == large


async def test_a_call_that_breaks_the_router_is_told_so(
    routing: Routing, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with FakeEngine().serving() as engine, routing(engine) as client:

        async def broken(exchange: Exchange) -> Answer:
            raise ZeroDivisionError

        with monkeypatch.context() as patched:
            patched.setattr(listener_of(client), "handles", {LINE: broken})
            async with wire(client) as sent:
                sent.send(post(BODY))
                answer = await sent.answer()
                assert await sent.reader.read() == b""
        async with client.post() as response:
            assert response.status == 200

    assert answer.status == 500
    assert json.loads(answer.body)["error"]["message"] == "the router failed at this call"
    assert "a call failed" in caplog.text
