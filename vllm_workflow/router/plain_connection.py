"""Connections of clients that send plain calls, read and answered without aiohttp.

Nearly every request is a POST to one of a few paths, with a short head that comes at once and the
length of its body. A general server makes many objects for it. What is written here takes such
requests only; at the first other one, malformed ones among them, aiohttp gets the connection with
all that was not read of it, and keeps it. llhttp, by `httptools`, judges in both what is HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from typing import TYPE_CHECKING, cast

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser

from vllm_workflow.router.errors import error_answer
from vllm_workflow.router.exchange import Handle
from vllm_workflow.router.headers import HeadError, Headers, read
from vllm_workflow.router.plain import PlainExchange

if TYPE_CHECKING:
    from vllm_workflow.router.listener import Listener

MAX_PLAIN_BODY_BYTES = 1 << 20
LINGERING_S = 2.0
"""A refused body is read and thrown away for this long, so that its sender sees the answer."""
MAX_AHEAD_BYTES = 64 << 10
"""Of requests that are sent before the one under way is answered. A client that sends more is cut
off: one that is not read from would not be seen to leave, either."""
_ONCE = ("host", "content-length", "content-type", "user-agent")
"""Whoever comes after the router might believe another one than it does, or refuse two."""
_UNUSUAL = (
    *("transfer-encoding", "content-encoding", "expect", "upgrade", "trailer", "te"),
    # Of these, too, there may be one only.
    *("server", "etag", "max-forwards", "content-location", "content-range"),
)
_logger = logging.getLogger(__name__)


class PlainConnection:
    """One connection of a client, until it sends something that is not plain.

    An `asyncio.Protocol` that does not inherit, see `Connection`.
    """

    __slots__ = (
        "_ahead",
        "_drained",
        "_exchange",
        "_fields",
        "_handle",
        "_idle_since",
        "_idle_timer",
        "_is_lingering",
        "_limits",
        "_listener",
        "_loop",
        "_lost",
        "_next",
        "_num_trusts",
        "_transport",
        "_write_timer",
        "is_write_paused",
        "task",
    )

    def __init__(self, listener: Listener, loop: asyncio.AbstractEventLoop) -> None:
        self.is_write_paused = False
        self.task: asyncio.Task[None] | None = None
        """Answers one request after the other: to make one for each took longer."""
        self._listener = listener
        self._limits = listener.limits
        self._num_trusts = listener.num_trusts
        self._loop = loop
        self._transport: asyncio.Transport | None = None
        self._fields: list[tuple[str, str]] = []
        self._exchange: PlainExchange | None = None
        self._handle: Handle | None = None
        self._next: asyncio.Future[None] | None = None
        """Until there is a request."""
        self._ahead = b""
        self._is_lingering = False
        self._drained: asyncio.Future[None] | None = None
        self._lost: asyncio.Future[None] | None = None
        self._idle_since = loop.time()
        self._idle_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    @property
    def is_ending(self) -> bool:
        listener = self._listener
        return listener.is_ending or self._num_trusts != listener.num_trusts

    # Its life.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is none by its type
        self._listener.plain.add(self)
        self._listener.num_connections += 1
        if self._listener.is_ending:  # those that were there before have been told
            self.close()
            return
        if self._listener.num_connections > self._limits.max_connections:
            self._hand_over(b"")
            return
        taken = transport.get_extra_info("socket")
        if taken is not None:
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._idle_timer = self._loop.call_later(self._limits.idle_timeout_s, self._look_idle)

    def eof_received(self) -> None:
        """Let the transport close itself."""

    def connection_lost(self, exc: Exception | None) -> None:
        self._leave()
        if self._lost is not None and not self._lost.done():
            self._lost.set_result(None)
        # A cancelled task knows where it was, so all that it had would stay until cycles are
        # looked for, bodies among it.
        task, self.task = self.task, None
        if task is not None and self._exchange is not None:
            task.cancel()
        self._exchange = None

    def _leave(self) -> None:
        self._transport = None
        self._listener.plain.discard(self)
        self._listener.num_connections -= 1
        self._take_ahead()
        self._wake()
        for timer in (self._idle_timer, self._write_timer):
            if timer is not None:
                timer.cancel()

    def _hand_over(self, data: bytes) -> None:
        """Let aiohttp have the connection, and what is not read of it."""
        transport = self._transport
        assert transport is not None
        self._leave()
        protocol = self._listener.aiohttp_protocol(self._num_trusts)
        transport.set_protocol(protocol)
        protocol.connection_made(transport)
        if data:  # when what waits for requests there has begun to; until then no more may come
            transport.pause_reading()
            self._loop.call_soon(_go_on_reading, transport, protocol, data)

    def _look_idle(self) -> None:
        """Close the connection if there was no request for long."""
        timeout_s = self._limits.idle_timeout_s
        idle_s = 0.0 if self._exchange is not None else self._loop.time() - self._idle_since
        if idle_s >= timeout_s:
            self.close()
        else:
            self._idle_timer = self._loop.call_later(timeout_s - idle_s, self._look_idle)

    def end(self) -> None:
        """End the connection if nothing is under way on it."""
        if self._exchange is None:
            self.close()

    @property
    def is_sending(self) -> bool:
        """Whether the client has not taken all that was written."""
        return self._transport is not None and self._transport.get_write_buffer_size() > 0

    def close(self) -> None:
        """End the connection when what was written is sent; at once if that takes too long."""
        if self._transport is None:
            return
        self._transport.close()
        if self.is_sending and self._write_timer is None:
            self._write_timer = self._loop.call_later(self._limits.write_timeout_s, self.abort)

    def lost(self) -> asyncio.Future[None]:
        """Return what is done when the connection has ended, which is to be asked for before."""
        self._lost = self._loop.create_future()
        return self._lost

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    # Requests.

    def data_received(self, data: bytes) -> None:
        exchange = self._exchange
        if exchange is None:
            self._begin(data)
        elif exchange.missing:
            self._feed(exchange, data)
        else:
            self._keep(data)

    def _begin(self, data: bytes) -> None:
        """Begin with a request, of which at least the first byte is here."""
        handle = self._listener.handles.get(data[: data.find(b"\r\n")])
        end = data.find(b"\r\n\r\n") + 4
        if handle is None or not 4 <= end <= self._limits.max_header_bytes:
            self._hand_over(data)
            return
        headers = self._headers(data if end == len(data) else data[:end])
        if headers is None or not self._is_plain(headers):
            self._hand_over(data)
            return
        exchange = self._exchange = PlainExchange(
            self, data[5 : data.find(b" ", 5)].decode(), headers
        )
        self._handle = handle
        if end < len(data):
            self._feed(exchange, data[end:])
        if self.task is None:
            self.task = self._loop.create_task(self._serve())
        else:
            self._wake()

    def _headers(self, head: bytes) -> Headers | None:
        """Return the headers of a request; None if it is no HTTP, or says what is not for here."""
        headers = read(head)
        if headers is not None:
            return headers
        self._fields = []
        try:
            HttpRequestParser(self).feed_data(head)
        except (HttpParserError, HttpParserUpgrade):
            return None
        headers = Headers.of(self._fields)
        self._fields = []  # keys among them
        for name in _UNUSUAL:
            if name in headers:
                return None
        for name in _ONCE:
            if headers.has_several(name):
                return None
        for value in headers.values("connection"):
            if value.lower() not in {"keep-alive", "close"}:
                return None
        return headers

    def _is_plain(self, headers: Headers) -> bool:
        if headers.num_given > self._limits.max_headers or "host" not in headers:
            return False
        length = headers.get("content-length")
        return (
            0 < len(length) <= 7
            and length.isascii()
            and length.isdecimal()
            and int(length) <= MAX_PLAIN_BODY_BYTES
        )

    def on_header(self, name: bytes, value: bytes) -> None:
        """Called by the parser."""
        self._fields.append((name.decode(), value.decode("utf-8", "surrogateescape").strip(" \t")))

    def _feed(self, exchange: PlainExchange, data: bytes) -> None:
        """Take what has come of a body."""
        if len(data) > exchange.missing:
            self._keep(data[exchange.missing :])
            data = data[: exchange.missing]
        if self._is_lingering:
            exchange.missing -= len(data)
            if not exchange.missing:
                self.close()
            return
        exchange.feed(data)

    def _keep(self, data: bytes) -> None:
        """Keep what was sent ahead of its turn, or cut off who sent too much of it."""
        self._ahead += data
        if not self._listener.bodies.count(len(data)) or len(self._ahead) > MAX_AHEAD_BYTES:
            self._take_ahead()
            self.abort()

    def _take_ahead(self) -> bytes:
        data, self._ahead = self._ahead, b""
        self._listener.bodies.count(-len(data))
        return data

    # Answers.

    @property
    def is_answering(self) -> bool:
        """Whether there is a request that has not been answered."""
        return self._exchange is not None

    def _wake(self) -> None:
        if self._next is not None and not self._next.done():
            self._next.set_result(None)

    async def _serve(self) -> None:
        """Answer requests until there can be none any more."""
        try:
            while self._transport is not None:
                exchange, handle = self._exchange, self._handle
                if exchange is None or handle is None:
                    self._next = self._loop.create_future()
                    await self._next
                    self._next = None
                    continue
                await self._answer(exchange, handle)
                if self._exchange is exchange:  # the connection is about to end
                    break
        except Exception:
            _logger.exception("a connection failed")
            self.abort()
        finally:
            self.task = None

    async def _answer(self, exchange: PlainExchange, handle: Handle) -> None:
        try:
            answer = await handle(exchange)
        except asyncio.CancelledError:  # whoever it was, nobody else would end the connection
            self.abort()
            raise
        except Exception:
            _logger.exception("a call failed")
            if exchange.has_begun:
                self.abort()
                return
            answer = error_answer(500, "the router failed at this call")
            exchange.closes = True
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        try:
            exchange.end(answer)
        except HeadError:
            _logger.exception("an answer cannot be written")
            self.abort()
            return
        if self.is_write_paused:
            await self.drained()
        self._ended(exchange)

    def _ended(self, exchange: PlainExchange) -> None:
        if exchange.missing:
            self._is_lingering = True
            if self._idle_timer is not None:
                self._idle_timer.cancel()
            self._idle_timer = self._loop.call_later(LINGERING_S, self.close)
        elif exchange.closes or self.is_ending:
            self.close()
        else:
            self._exchange = None
            self._idle_since = self._loop.time()
            if self._ahead:
                self._begin(self._take_ahead())

    def write(self, data: bytes) -> None:
        transport = self._transport
        if transport is None or transport.is_closing():
            raise ConnectionResetError("the client has left")
        transport.write(data)

    async def drained(self) -> None:
        self._drained = self._loop.create_future()
        try:
            await self._drained
        finally:
            self._drained = None

    def pause_writing(self) -> None:
        self.is_write_paused = True
        if self._write_timer is None:
            self._write_timer = self._loop.call_later(self._limits.write_timeout_s, self.abort)

    def resume_writing(self) -> None:
        self.is_write_paused = False
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)
        if self._transport is not None and self._transport.is_closing():
            self.close()  # what is left may take as long again


def _go_on_reading(transport: asyncio.Transport, protocol: asyncio.Protocol, data: bytes) -> None:
    transport.resume_reading()
    protocol.data_received(data)
