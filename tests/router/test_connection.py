"""Requests to an instance over real sockets, and what servers may answer to them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import pytest

from vllm_workflow.router.connection import MAX_HEAD_BYTES, Connection
from vllm_workflow.router.errors import BrokenOffError, RequestError
from vllm_workflow.router.headers import HeadError, Headers
from vllm_workflow.router.pool import KEEPALIVE_S, Pool

pytestmark = pytest.mark.anyio

BODY = b'{"a": 1}'
WITH_LENGTH = b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\nX-A: \xc3\xa9\r\n\r\n" + BODY
CHUNKED = (
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nX-A: \xc3\xa9\r\n\r\n"
    b'3\r\n{"a\r\n5;x=y\r\n": 1}\r\n0\r\nX-Trailer: b\r\n\r\n'
)
TO_THE_END = b"HTTP/1.0 200 OK\r\nX-A: \xc3\xa9\r\n\r\n" + BODY


class Server:
    """Says on every connection what it was given, and notes what was sent to it."""

    def __init__(self, *answers: bytes, closes: bool = False) -> None:
        self.answers = answers
        self.closes = closes
        self.num_connections = 0
        self.received = bytearray()
        self.left = asyncio.Event()
        self.url = ""

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[Pool]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        pool = Pool(self.url, True)
        try:
            async with asyncio.timeout(10):
                yield pool
        finally:
            pool.close()
            server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        try:
            for answer in self.answers:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r")[0])
                self.received += head + await reader.readexactly(length)
                writer.write(answer)
                await writer.drain()
            if not self.closes:
                await reader.read()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self.left.set()
            writer.close()


def all_of_it(status: int, headers: Mapping[str, str]) -> float:
    return 1e9


def nothing(status: int, headers: Mapping[str, str]) -> float:
    return 0


async def asked(
    pool: Pool,
    body: bytes = b"{}",
    *,
    heard: Callable[[], None] = lambda: None,
    hold: Callable[[int, Mapping[str, str]], float] = all_of_it,
) -> Connection:
    """Send a request by a kept connection or a new one."""
    connection = pool.kept() or await pool.connect()
    connection.send(
        pool.head("/v1", Headers.of([("X-B", "1")]), len(body)), body, heard=heard, hold=hold
    )
    if not connection.is_sent:
        await connection.send_rest(body)
    return connection


async def whole(connection: Connection) -> bytes:
    await connection.begun()
    body = bytearray(connection.taken())
    while piece := await connection.read():
        body += piece
    return bytes(body)


@pytest.mark.parametrize("answer", [WITH_LENGTH, CHUNKED, TO_THE_END])
@pytest.mark.parametrize(
    "before", [b"", b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 103 Early Hints\r\nX-A: b\r\n\r\n"]
)
async def test_however_an_answer_is_framed_it_is_the_same(answer: bytes, before: bytes) -> None:
    async with Server(before + answer, closes=True).serving() as pool:
        connection = await asked(pool)
        assert await whole(connection) == BODY
        assert (connection.status, connection.reason) == (200, "OK")
        assert connection.headers.values("x-a") == ["é"]
        assert "x-trailer" not in connection.headers


@pytest.mark.parametrize("answer", [WITH_LENGTH, CHUNKED])
async def test_wherever_packets_end_an_answer_is_the_same(answer: bytes) -> None:
    for at in range(1, len(answer)):
        connection = Connection(asyncio.get_running_loop())
        connection.connection_made(Silent())
        heard = asyncio.Event()
        connection.send(b"", b"", heard=heard.set, hold=all_of_it)
        connection.data_received(answer[:at])
        assert not connection.is_complete
        connection.data_received(answer[at:])
        assert connection.is_complete
        assert connection.taken() == BODY
        assert connection.reason == "OK"
        assert heard.is_set()
        assert connection.may_be_kept


class Silent(asyncio.Transport):
    """A transport whose other side only takes."""

    def __init__(self) -> None:
        super().__init__()
        self.is_aborted = False

    def write(self, data: object) -> None:
        pass

    def is_closing(self) -> bool:
        return self.is_aborted

    def abort(self) -> None:
        self.is_aborted = True


@pytest.mark.parametrize("answer", [WITH_LENGTH, CHUNKED])
async def test_an_answer_that_ends_before_its_end_is_broken_off(answer: bytes) -> None:
    for at in (0, 5, 20, len(answer) // 2, len(answer) - 1):
        async with Server(answer[:at], closes=True).serving() as pool:
            connection = await asked(pool)
            with pytest.raises(BrokenOffError):
                await whole(connection)
            pool.give_back(connection)
            assert pool.kept() is None


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\nTransfer-Encoding: chunked\r\n\r\n" + BODY,
        b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\nContent-Length: 9\r\n\r\n" + BODY,
        b"HTTP/1.1 200 OK\r\nContent-Length: +8\r\n\r\n" + BODY,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nZ\r\n",
        b"HTTP/1.1 200 OK\r\nX: a\x00b\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: h2c\r\nConnection: Upgrade\r\n\r\n" + BODY,
        b"HTTP/1.1 200 OK\r\n" + b"X: a\r\n" * MAX_HEAD_BYTES,
        b"HTTP/1.1 200 OK\r\nX: " + b"a" * 3 * MAX_HEAD_BYTES,
        b"HTTP/1.1 100 Continue\r\n\r\n" * MAX_HEAD_BYTES,
    ],
    ids=lambda answer: repr(answer)[:60],
)
async def test_what_is_no_answer_ends_the_connection(answer: bytes) -> None:
    async with (server := Server(answer)).serving() as pool:
        connection = await asked(pool)
        with pytest.raises(BrokenOffError):
            await whole(connection)
        pool.give_back(connection)
        await server.left.wait()
        assert not connection.may_be_kept


async def test_a_connection_serves_one_request_after_another() -> None:
    async with (server := Server(WITH_LENGTH, CHUNKED, WITH_LENGTH)).serving() as pool:
        for _ in range(3):
            connection = await asked(pool)
            assert await whole(connection) == BODY
            pool.give_back(connection)

    assert server.num_connections == 1
    assert server.received == 3 * (
        b"POST /v1 HTTP/1.1\r\nHost: %b\r\nX-B: 1\r\nContent-Length: 2\r\n\r\n{}"
        % server.url.removeprefix("http://").encode()
    )


async def test_an_answer_that_nobody_took_is_not_given_to_the_next_one() -> None:
    async with (server := Server(WITH_LENGTH, WITH_LENGTH)).serving() as pool:
        left = await asked(pool)
        await left.begun()
        pool.give_back(left)  # as when its client leaves in this moment
        connection = await asked(pool)
        assert await whole(connection) == BODY

    assert connection is not left
    assert server.num_connections == 2


@pytest.mark.parametrize(
    "answer",
    [
        WITH_LENGTH.replace(b"X-A", b"Connection: close\r\nX-A"),
        WITH_LENGTH + b"HTTP/1.1 200 OK\r\n",
        WITH_LENGTH + b"more",
        TO_THE_END,
        WITH_LENGTH.replace(b"HTTP/1.1", b"HTTP/1.0"),
    ],
)
async def test_a_connection_that_says_more_or_ends_is_not_kept(answer: bytes) -> None:
    async with Server(answer, closes=answer == TO_THE_END).serving() as pool:
        connection = await asked(pool)
        assert await whole(connection) == BODY
        pool.give_back(connection)
        assert pool.kept() is None


async def test_a_kept_connection_that_ends_or_is_old_is_not_used() -> None:
    async with (server := Server(WITH_LENGTH, closes=True)).serving() as pool:
        connection = await asked(pool)
        await whole(connection)
        pool.give_back(connection)
        await server.left.wait()
        while not connection.is_lost:
            await asyncio.sleep(0)
        assert pool.kept() is None

    async with Server(WITH_LENGTH).serving() as pool:
        connection = await asked(pool)
        await whole(connection)
        pool.give_back(connection)
        connection.idle_since -= 2 * KEEPALIVE_S
        assert pool.kept() is None
        assert connection.is_lost


async def test_what_comes_unasked_ends_a_kept_connection() -> None:
    connection = Connection(asyncio.get_running_loop())
    transport = Silent()
    connection.connection_made(transport)
    connection.data_received(b"HTTP/1.1 408 Request Timeout\r\n\r\n")

    assert transport.is_aborted
    assert not connection.may_be_kept


async def test_a_large_body_is_sent_whole() -> None:
    body = b"x" * 3_000_001
    async with (server := Server(WITH_LENGTH)).serving() as pool:
        assert await whole(await asked(pool, body)) == BODY

    assert server.received.endswith(b"\r\n\r\n" + body)


async def test_a_server_that_answers_while_it_is_sent_to_is_sent_no_more() -> None:
    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(WITH_LENGTH.replace(b"200 OK", b"413 Too Large"))
        await writer.drain()
        await ended.wait()
        writer.close()
        closed.set()

    ended, closed = asyncio.Event(), asyncio.Event()
    server = await asyncio.start_server(refuse, "127.0.0.1", 0)
    pool = Pool(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", True)
    async with asyncio.timeout(10):
        connection = await asked(pool, b"x" * 50_000_000)
        assert await whole(connection) == BODY
    assert connection.status == 413
    assert not connection.may_be_kept
    connection.close()
    ended.set()
    await closed.wait()
    pool.close()
    server.close()


async def test_what_is_to_be_held_is_not_waited_for_beyond_its_bound() -> None:
    more = b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n" + b"x" * 50
    async with Server(more).serving() as pool:
        connection = await asked(pool, hold=lambda status, headers: 49)
        await connection.begun()
        assert connection.taken() == b"x" * 50
        assert not connection.is_complete
        connection.close()


async def test_a_reader_that_takes_its_time_makes_the_server_wait() -> None:
    size = 20_000_000
    head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size
    async with Server(head + b"x" * size).serving() as pool:
        connection = await asked(pool, hold=nothing)
        await connection.begun()
        for _ in range(1_000):
            await asyncio.sleep(0)
        assert len(first := connection.taken()) < 1_000_000
        assert len(first) + len(await whole(connection)) == size


async def test_an_answer_can_be_given_up_while_it_is_waited_for() -> None:
    async with (
        server := Server(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nab")
    ).serving() as pool:
        connection = await asked(pool)
        waiting = asyncio.create_task(connection.begun())
        while not connection.has_head:
            await asyncio.sleep(0)
        connection.abandon()
        with pytest.raises(TimeoutError):
            await waiting
        pool.give_back(connection)
        await server.left.wait()


async def test_an_answer_that_came_as_it_was_given_up_is_the_last_one_there() -> None:
    async with Server(WITH_LENGTH, WITH_LENGTH).serving() as pool:
        connection = await asked(pool, hold=nothing)
        connection.abandon()
        while not connection.is_complete:
            await asyncio.sleep(0)
        await connection.begun()
        assert connection.taken() == BODY
        pool.give_back(connection)
        assert pool.kept() is None


async def test_no_header_can_bring_another_one_along() -> None:
    pool = Pool("http://localhost:1/base", True)

    assert pool.head("/v1", Headers(), 2) == (
        b"POST /base/v1 HTTP/1.1\r\nHost: localhost:1\r\nContent-Length: 2\r\n\r\n"
    )
    for value in ("a\r\nX-Evil: b", "a\nb", "a\rb", "a\0b"):
        with pytest.raises(HeadError, match="line break"):
            Headers.of([("X-A", value)])
        with pytest.raises(HeadError, match="line break"):
            Headers().set("X-A", value)
        with pytest.raises(HeadError, match="line break"):
            Headers().add("X-A", value)
        with pytest.raises(RequestError, match="line break"):
            pool.head(f"/v1?{value}", Headers(), 2)


async def test_a_name_is_looked_up_once_for_all_who_connect_at_the_same_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lookups = []
    loop = asyncio.get_running_loop()
    look_up = loop.getaddrinfo

    async def noted(host: str, *args: Any, **kwargs: Any) -> Any:
        lookups.append(host)
        return await look_up(host, *args, **kwargs)

    monkeypatch.setattr(loop, "getaddrinfo", noted)
    async with (server := Server(WITH_LENGTH)).serving() as pool:
        named = Pool(server.url.replace("127.0.0.1", "localhost"), True)
        connections = await asyncio.gather(*(named.connect() for _ in range(5)))
        connections.append(await named.connect())
        assert lookups == ["localhost"]
        for connection in connections:
            connection.close()
        named.close()
        assert pool.kept() is None


async def test_a_connection_that_is_being_made_as_its_pool_is_closed_is_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    is_asked, may_go_on = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    look_up = loop.getaddrinfo

    async def slow(*args: Any, **kwargs: Any) -> Any:
        is_asked.set()
        await may_go_on.wait()
        return await look_up(*args, **kwargs)

    monkeypatch.setattr(loop, "getaddrinfo", slow)
    async with (server := Server(WITH_LENGTH)).serving():
        pool = Pool(server.url.replace("127.0.0.1", "localhost"), True)
        connecting = asyncio.create_task(pool.connect())
        await is_asked.wait()
        pool.close()
        may_go_on.set()
        connection = await connecting
        pool.give_back(connection)
        assert connection.is_lost
