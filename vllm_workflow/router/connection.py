"""One connection to an instance: HTTP/1.1, one request at a time, and its answer as it comes.

A general client makes objects, timers and copies for each request that a router has no use for;
this one costs a fraction of it. llhttp, by `httptools`, judges what is HTTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from http import HTTPStatus
from typing import Final, cast

from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser

from vllm_workflow.router.errors import BrokenOffError
from vllm_workflow.router.headers import Headers, read

MAX_HEAD_BYTES = 64 << 10
"""Of an answer, interim ones included; a server that says more is not listened to."""
_HIGH_WATER_BYTES = 128 << 10
"""Beyond what is to be held, before the server is made to wait."""
_PIECE_BYTES = 256 << 10
"""A request body larger than this is written in such pieces, as the server takes them."""
_SMALL_REQUEST_BYTES = 8 << 10
"""A body up to this size is copied behind its head; a larger one goes out beside it."""

HowMuchToHold = Callable[[int, Headers], float]
"""Bytes of an answer of such a status and headers that its reader is not woken for."""

_STATUS_LINES: Final[dict[bytes, int]] = {
    f"HTTP/1.1 {status.value} {status.phrase}".encode(): status.value
    for status in HTTPStatus
    if status >= 200 and status not in {204, 205, 304}
}
"""Those that say nothing out of the ordinary, of answers that have a body."""


class Connection:
    """One connection to an instance, an `asyncio.Protocol`.

    `send`, then `begun`, then `read` until it returns nothing; after that `may_be_kept` tells
    whether the next request can go the same way. All else ends with `close`.
    """

    # It does not inherit, so that it can be compiled to a class with fields at fixed places.

    __slots__ = (
        "_chunks",
        "_drained",
        "_error",
        "_fields",
        "_has_head",
        "_heard",
        "_held",
        "_hold",
        "_is_paused",
        "_is_sent",
        "_is_write_paused",
        "_keeps",
        "_loop",
        "_num_bytes",
        "_num_head_bytes",
        "_num_missing",
        "_parser",
        "_reason",
        "_transport",
        "_waiter",
        "headers",
        "idle_since",
        "is_complete",
        "is_lost",
        "status",
    )

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.idle_since = 0.0
        """Instant, for whoever keeps it."""
        self.is_lost = False
        """Whether nothing can be sent on it any more."""
        self.is_complete = True
        """Whether the whole of the last answer has come."""
        self.status = 0
        self.headers = Headers()
        self._fields: list[tuple[str, str]] = []
        self._parser: HttpResponseParser | None = HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._drained: asyncio.Future[None] | None = None
        self._is_write_paused = False
        self._is_paused = False
        self._is_sent = True
        self._has_head = False
        self._keeps = True
        """Whether the server does not end the connection with the answer."""
        self._held = 0.0
        self._num_bytes = self._num_head_bytes = 0
        """Of the body and not read yet; given to the parser before there was a head."""
        self._num_missing = -1
        """Of a body whose head was read without the parser; negative for others."""
        self._reason = b""
        self._error: Exception | None = None
        self._chunks: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is none by its type

    def eof_received(self) -> None:
        """Let the transport close itself."""

    # The request.

    def send(
        self, head: bytes, body: bytes, *, heard: Callable[[], None], hold: HowMuchToHold
    ) -> None:
        """Begin a request. `send_rest` must follow if `is_sent` is False then.

        Args:
            head: Request line and headers, with the empty line.
            body: As long as the head says.
            heard: Called whenever some of the answer's body, or its end, has come.
            hold: What `begun` waits for.
        """
        assert self._transport is not None
        self.is_complete = self._has_head = False
        self.status = self._num_bytes = self._num_head_bytes = 0
        self._held = 0.0
        self._num_missing = -1
        self._reason = b""
        self._fields = []
        self._heard, self._hold = heard, hold
        self._is_sent = len(body) <= _PIECE_BYTES
        if len(body) <= _SMALL_REQUEST_BYTES:
            self._transport.write(head + body)
        elif self._is_sent:
            self._transport.writelines((head, body))
        else:
            self._transport.write(head)

    @property
    def is_sent(self) -> bool:
        return self._is_sent

    async def send_rest(self, body: bytes) -> None:
        """Write a large body as the server takes it, or until it answers without."""
        assert self._transport is not None
        rest = memoryview(body)
        while rest and not self._has_head and self._error is None:
            self._transport.write(rest[:_PIECE_BYTES])
            rest = rest[_PIECE_BYTES:]
            if self._is_write_paused and self._error is None:
                self._drained = self._loop.create_future()
                try:
                    await self._drained
                finally:
                    self._drained = None
        self._is_sent = not rest

    def pause_writing(self) -> None:
        self._is_write_paused = True

    def resume_writing(self) -> None:
        self._is_write_paused = False
        self._go_on_sending()

    def _go_on_sending(self) -> None:
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)

    # The answer.

    @property
    def has_head(self) -> bool:
        """Whether status and headers of the answer are there."""
        return self._has_head

    @property
    def reason(self) -> str:
        return self._reason.decode("utf-8", "surrogateescape")

    async def begun(self) -> None:
        """Wait for the end of an answer of which there is less than `hold` says; else for more.

        Raises:
            BrokenOffError: It broke off before.
            TimeoutError: By `abandon`.
        """
        if not self._is_due():
            try:
                await self._until_due()
            finally:
                self._waiter = None
        if self._error is not None and (self._num_bytes <= self._held or not self._has_head):
            raise self._error

    async def read(self) -> bytes:
        """Return what has come since, at least a byte; nothing at the end.

        Raises:
            BrokenOffError: It broke off, and all that had come was returned.
            TimeoutError: By `abandon`.
        """
        self._held = 0.0
        if not self._is_due():
            try:
                await self._until_due()
            finally:
                self._waiter = None
        if self._chunks:
            return self.taken()
        if self._error is not None:
            raise self._error
        return b""

    def taken(self) -> bytes:
        """Return what has come and was not read."""
        chunks = self._chunks
        data = chunks[0] if len(chunks) == 1 else b"".join(chunks)
        self._chunks = []
        self._num_bytes = 0
        if self._is_paused and self._transport is not None:
            self._is_paused = False
            self._transport.resume_reading()
        return data

    def abandon(self) -> None:
        """End the wait for an answer that will not come, by `TimeoutError`."""
        self._fail(TimeoutError("the answer was given up"))

    def _until_due(self) -> asyncio.Future[None]:
        waiter: asyncio.Future[None] = self._loop.create_future()
        self._waiter = waiter
        return waiter

    def _is_due(self) -> bool:
        return self.is_complete or self._error is not None or self._num_bytes > self._held

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done() and self._is_due():
            waiter.set_result(None)

    def data_received(self, data: bytes) -> None:
        if self.is_complete:  # it was not asked for
            self.close()
            return
        num_bytes = self._num_bytes
        if self._num_missing >= 0:
            self._take(data)
        elif self._num_head_bytes or not self._begin(data):
            self._parse(data)
            if not self._has_head:
                return
        if self._num_bytes > num_bytes or self.is_complete:
            self._heard()
            self._wake()
        if self._num_bytes > self._held + _HIGH_WATER_BYTES and not self.is_complete:
            self._pause()

    def _begin(self, data: bytes) -> bool:
        """Take the first bytes of an answer if they have a usual head, and tell its length."""
        end = data.find(b"\r\n\r\n") + 4
        status = _STATUS_LINES.get(data[: data.find(b"\r\n")], 0)
        if not status or not 4 <= end <= MAX_HEAD_BYTES:
            return False
        headers = read(data if end == len(data) else data[:end])
        if headers is None:
            return False
        length = headers.get("content-length")
        if not 0 < len(length) <= 15 or not length.isdecimal():
            return False
        self.headers = headers
        self._reason = data[13 : data.find(b"\r\n")]
        self._num_missing = int(length)
        self._keeps = headers.get("connection").lower() != "close"
        self._headed(status)
        self._take(data[end:])
        return True

    def _take(self, data: bytes) -> None:
        """Take bytes of a body of known length."""
        num_over = len(data) - self._num_missing
        if num_over > 0:  # more than was asked for
            data = data[: self._num_missing]
        self._num_missing -= len(data)
        if data:
            self.on_body(data)
        if not self._num_missing:
            self.is_complete = True
        if num_over > 0:
            self.close()

    def _headed(self, status: int) -> None:
        self.status, self._has_head = status, True
        self._held = self._hold(status, self.headers)
        self._go_on_sending()

    def _parse(self, data: bytes) -> None:
        """Have llhttp look at bytes of an answer."""
        parser = self._parser
        assert parser is not None
        if not self._has_head:
            self._num_head_bytes += len(data)
        try:
            parser.feed_data(data)
        except (HttpParserError, HttpParserUpgrade) as e:
            if not self.is_complete:
                self._fail(BrokenOffError(f"expected HTTP/1.1, got an error: {e}"))
            self.close()
        if not self._has_head and self._num_head_bytes > MAX_HEAD_BYTES:
            self._fail(BrokenOffError(f"expected headers of at most {MAX_HEAD_BYTES} bytes"))

    def _pause(self) -> None:
        if not self._is_paused and self._transport is not None and not self.is_lost:
            self._is_paused = True
            self._transport.pause_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_lost = True
        if not self.is_complete:
            if exc is None and self._ends_with_connection():
                self.is_complete = True
                self._heard()
                self._wake()
            else:
                self._fail(BrokenOffError("the connection was closed"))
        self._transport = None
        self._parser = None  # which refers to this
        self._go_on_sending()

    def _ends_with_connection(self) -> bool:
        headers = self.headers
        return (
            self._has_head
            and self._error is None
            and "content-length" not in headers
            and "transfer-encoding" not in headers
        )

    def _fail(self, error: Exception) -> None:
        if self.is_complete or self._error is not None:
            return
        self._error = error
        self._wake()
        self._go_on_sending()

    # Called by the parser. What they raise ends the connection.

    def on_message_begin(self) -> None:
        if self.is_complete:
            raise BrokenOffError("more came than was asked for")

    def on_status(self, reason: bytes) -> None:
        self._reason += reason

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._has_head:  # else a trailer
            self._fields.append((name.decode(), value.decode("utf-8", "surrogateescape")))

    def on_headers_complete(self) -> None:
        assert self._parser is not None
        status = self._parser.get_status_code()
        if status >= 200:
            self.headers, self._fields = Headers.of(self._fields), []
            self._headed(status)
        elif status == 101:
            raise BrokenOffError("another protocol was not asked for")

    def on_body(self, data: bytes) -> None:
        self._chunks.append(data)
        self._num_bytes += len(data)

    def on_message_complete(self) -> None:
        if not self._has_head:  # 100 Continue and the like
            self._reason = b""
            self._fields = []
            return
        assert self._parser is not None
        self.is_complete = True
        self._keeps = self._parser.should_keep_alive()

    # The next request.

    @property
    def may_be_kept(self) -> bool:
        """Whether another request can be sent on it: nothing of an earlier answer is left."""
        return (
            self.is_complete
            and self._error is None
            and not self._chunks
            and self._is_sent
            and not self.is_lost
            and self._keeps
            and self._transport is not None
            and not self._transport.is_closing()
        )

    def close(self) -> None:
        """End the connection at once; the server stops what it does for it."""
        self.is_lost = True
        if self._transport is not None:
            self._transport.abort()
