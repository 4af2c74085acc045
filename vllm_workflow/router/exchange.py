"""A client's request and the way to answer it, whatever reads and writes the HTTP."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import NamedTuple, Protocol

from aiohttp import web
from multidict import CIMultiDict

from vllm_workflow.router.headers import Headers


class Answer(NamedTuple):
    """What a client gets."""

    status: int
    headers: Headers
    body: bytes | None
    """None: it has been written piece by piece."""
    reason: str = ""


class Reply(Protocol):
    """The way to answer a client piece by piece."""

    async def begin(self, answer: Answer) -> None:
        """Begin an answer without a body, which `write` gives it."""

    async def write(self, data: bytes) -> None:
        """Write a piece, and wait while the client does not take what was written.

        Raises:
            ConnectionResetError: The client has left.
        """

    def close(self) -> None:
        """End the connection when what was written is sent; the answer is not whole."""

    def abort(self) -> None:
        """End the connection at once."""


class Exchange(Reply, Protocol):
    """One request of a client.

    An answer that comes piece by piece is written by `begin` and `write`; a whole one is returned
    by whoever handles the request. A client that leaves cancels the task that handles it.
    """

    headers: Headers
    path: str
    """As it was sent, with its query."""
    content_length: int | None
    """That is announced."""

    def whole(self) -> bytes | None:
        """Return the body if all of it is here, once."""

    async def more(self) -> bytes:
        """Return more of the body, at least a byte; nothing at its end."""


Handle = Callable[[Exchange], Awaitable[Answer]]


class AiohttpExchange:
    """A request that aiohttp has read."""

    def __init__(self, request: web.Request) -> None:
        self.headers = Headers.of(request.headers.items())
        self.path = request.rel_url.raw_path_qs
        self.content_length = request.content_length
        self._request = request
        self._transport = request.transport
        self._response = web.StreamResponse()

    def whole(self) -> bytes | None:
        content = self._request.content
        if content.is_eof() and content.exception() is None:
            return content.read_nowait()
        return None

    async def more(self) -> bytes:
        return await self._request.content.readany()

    async def begin(self, answer: Answer) -> None:
        self._response = web.StreamResponse(
            status=answer.status, reason=answer.reason or None, headers=_written(answer.headers)
        )
        if length := answer.headers.get("content-length"):
            self._response.content_length = int(length)
        await self._response.prepare(self._request)

    async def write(self, data: bytes) -> None:
        await self._response.write(data)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def response(self, answer: Answer) -> web.StreamResponse:
        """Return what aiohttp is to write, or to end."""
        return self._response if answer.body is None else response_of(answer)


def response_of(answer: Answer) -> web.Response:
    response = web.Response(
        status=answer.status,
        reason=answer.reason or None,
        headers=_written(answer.headers),
        body=answer.body,
    )
    if answer.headers.get("connection") == "close":
        response.force_close()
    return response


def _written(headers: Headers) -> CIMultiDict[str]:
    return CIMultiDict(headers.items())


def by_aiohttp(handle: Handle) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    """Return a handler for aiohttp's router."""

    async def handler(request: web.Request) -> web.StreamResponse:
        exchange = AiohttpExchange(request)
        return exchange.response(await handle(exchange))

    return handler
