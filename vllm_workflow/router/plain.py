"""A plain call of a client, see `plain_connection`, and its answer."""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import Protocol

from vllm_workflow.router.exchange import Answer
from vllm_workflow.router.head import head, http_date
from vllm_workflow.router.headers import Headers

_WITHOUT_BODY = frozenset({204, 304})
_PHRASES = {int(status): status.phrase for status in HTTPStatus}


class Connection(Protocol):
    """Where an answer is written to."""

    is_write_paused: bool
    """Whether the client has not taken what was written."""

    @property
    def is_ending(self) -> bool:
        """Whether the next answer is the last one."""

    def write(self, data: bytes) -> None:
        """Write.

        Raises:
            ConnectionResetError: The client has left.
        """

    async def drained(self) -> None:
        """Wait until the client has taken most of what was written."""

    def close(self) -> None:
        """End when what was written is sent."""

    def abort(self) -> None:
        """End at once."""


class PlainExchange:
    """One request, and its answer."""

    __slots__ = (
        "_connection",
        "_pieces",
        "_waiter",
        "closes",
        "content_length",
        "has_begun",
        "headers",
        "is_chunked",
        "missing",
        "path",
    )

    def __init__(self, connection: Connection, path: str, headers: Headers) -> None:
        self.headers = headers
        self.path = path
        self.missing = int(headers.get("content-length"))
        """Bytes of the body that have not come."""
        self.content_length: int | None = self.missing
        self.closes = False
        for each in headers.values("connection"):
            if each.lower() == "close":
                self.closes = True
        """Whether the connection ends with the answer; it does if some of the body is missing."""
        self.has_begun = False
        self.is_chunked = False
        self._connection = connection
        self._pieces: list[bytes] = []
        self._waiter: asyncio.Future[None] | None = None

    def feed(self, data: bytes) -> None:
        """Take what has come of the body."""
        self.missing -= len(data)
        self._pieces.append(data)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def whole(self) -> bytes | None:
        return None if self.missing else self._taken()

    def _taken(self) -> bytes:
        pieces, self._pieces = self._pieces, []
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    async def more(self) -> bytes:
        if not self._pieces and self.missing:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
            self._waiter = None
        return self._taken()

    async def begin(self, answer: Answer) -> None:
        self.has_begun = True
        length = answer.headers.get("content-length")
        self.is_chunked = not (length or answer.status in _WITHOUT_BODY)
        framing = "Transfer-Encoding: chunked\r\n" if self.is_chunked else ""
        if length:
            framing = f"Content-Length: {length}\r\n"
        self._connection.write(self._head(answer, framing))

    async def write(self, data: bytes) -> None:
        connection = self._connection
        connection.write(b"%x\r\n%b\r\n" % (len(data), data) if self.is_chunked else data)
        if connection.is_write_paused:
            await connection.drained()

    def end(self, answer: Answer) -> None:
        """Write a whole answer, or the end of one that has begun."""
        if answer.body is None:
            if self.is_chunked:
                self._connection.write(b"0\r\n\r\n")
        elif answer.status in _WITHOUT_BODY:
            self._connection.write(self._head(answer, ""))
        else:
            length = f"Content-Length: {len(answer.body)}\r\n"
            self._connection.write(self._head(answer, length) + answer.body)

    def _head(self, answer: Answer, lines: str) -> bytes:
        headers = answer.headers
        if "date" not in headers:
            lines += f"Date: {http_date()}\r\n"
        if headers.get("connection") == "close" or self.missing or self._connection.is_ending:
            self.closes = True
        if self.closes:
            lines += "Connection: close\r\n"
        reason = answer.reason or _PHRASES.get(answer.status, "")
        return head(f"HTTP/1.1 {answer.status} {reason}\r\n", headers, lines)

    def close(self) -> None:
        self._connection.close()

    def abort(self) -> None:
        self._connection.abort()
