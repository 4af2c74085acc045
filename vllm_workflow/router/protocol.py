"""HTTP as the router speaks it to clients: errors in OpenAI's form, and bounded patience.

What cannot be read as HTTP (headers too long, two lengths, a length that is no number) is refused
by the parser; here it gets its words. The words do not repeat what came, which may be a key.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, cast

from aiohttp import StreamReader, http_exceptions, web

from vllm_workflow.core.errors import ConfigError
from vllm_workflow.router.errors import error_json, error_response
from vllm_workflow.router.exchange import Handle
from vllm_workflow.router.handshakes import Arrival, Handshakes, abort
from vllm_workflow.router.limits import Bodies, LimitsConfig
from vllm_workflow.router.plain_connection import (
    LINGERING_S,
    MAX_AHEAD_BYTES,
    PlainConnection,
)
from vllm_workflow.router.tls import RenewableTls

_logger = logging.getLogger(__name__)
_LAST_WORDS_S = 1.0
"""For answers to calls that took too long to end."""
_MAX_AHEAD = 16
"""Requests that are sent before the one under way is answered; aiohttp would take twice as many,
and then not read on."""
_HEADS = 8
"""Times the size of one header that all may have together; aiohttp has no limit for that."""
_PHRASES = {
    408: "Request Timeout",
    431: "Request Header Fields Too Large",
    503: "Service Unavailable",
}


class Protocol(web.RequestHandler):
    """One connection of a client.

    aiohttp's own timer closes a connection on which no request is complete
    `idle_timeout_s` after the last one; the timers here are for headers that have begun, and for
    an answer that is not read. The latter runs while the transport has more to send than it
    wants to hold, so it costs nothing where clients read.
    """

    __slots__ = (
        "_has_received",
        "_head_timer",
        "_limits",
        "_listener",
        "_num_head_bytes",
        "_progress",
        "_rest_timer",
        "_trust",
        "_write_timer",
    )

    def __init__(self, listener: Listener, num_trusts: int, **kwargs: Any) -> None:
        limits = listener.limits
        super().__init__(
            listener.server,
            keepalive_timeout=limits.idle_timeout_s,
            max_line_size=limits.max_header_bytes,
            max_field_size=limits.max_header_bytes,
            max_headers=limits.max_headers,
            lingering_time=LINGERING_S,
            access_log=None,  # type: ignore[arg-type]
            logger=_logger,
            **kwargs,
        )
        self._listener = listener
        self._limits = limits
        self._trust = num_trusts
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._rest_timer: asyncio.TimerHandle | None = None
        self._has_received = False
        self._progress = (0, -1)
        """Requests that have begun, and what has come of the body of the last one."""
        self._num_head_bytes = 0
        """Received since then."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        listener = self._listener
        listener.num_connections += 1
        if listener.num_connections > self._limits.max_connections:
            self._end(503, "the router has as many connections as it may", "overloaded")

    def connection_lost(self, exc: BaseException | None) -> None:
        self._listener.num_connections -= 1
        self._stop_timer()
        self._stop_write_timer()
        if self._rest_timer is not None:
            self._rest_timer.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._write_timer is None:
            self._write_timer = asyncio.get_running_loop().call_later(
                self._limits.write_timeout_s, self._write_is_late
            )

    def resume_writing(self) -> None:
        self._stop_write_timer()
        super().resume_writing()

    def _write_is_late(self) -> None:
        self._write_timer = None
        if self.transport is not None:  # uvloop's is no asyncio.Transport
            self.transport.abort()

    def _look_at_rest(self, transport: asyncio.Transport, *, was_closing: bool = False) -> None:
        """See that what is left of answers does not keep a connection that is to be closed."""
        self._rest_timer = None
        if was_closing:
            transport.abort()
        elif transport.get_write_buffer_size() > 0:
            look = partial(self._look_at_rest, transport, was_closing=transport.is_closing())
            self._rest_timer = asyncio.get_running_loop().call_later(
                self._limits.write_timeout_s, look
            )

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def close(self) -> None:
        """As aiohttp's; one made in this moment, which does not wait for requests yet, would
        wait for ever: what comes after this is not read."""
        super().close()
        if self._waiter is None and not self._has_received and self.transport is not None:
            self.transport.close()

    def data_received(self, data: bytes) -> None:
        self._has_received = True
        super().data_received(data)
        if self._messages and self._is_far_ahead() and self.transport is not None:
            self.transport.abort()  # aiohttp would stop reading, and not see who leaves
            return
        if self._heads_are_long(len(data)):
            return
        waiter = self._waiter
        if waiter is None or waiter.done():  # a request is complete, or under way
            self._stop_timer()
        elif self._head_timer is None and self.transport is not None:
            self._head_timer = asyncio.get_running_loop().call_later(
                self._limits.header_timeout_s, self._head_is_late
            )

    def _is_far_ahead(self) -> bool:
        """Whether more is kept of requests that are not under way yet than may be."""
        ahead = [payload.total_bytes for _, payload in self._messages]
        if self._current_request is None:  # then the first one is begun in a moment
            del ahead[:1]
        return len(ahead) > _MAX_AHEAD or sum(ahead) > MAX_AHEAD_BYTES

    def _heads_are_long(self, num_bytes: int) -> bool:
        """Count what has come of a head, or of what follows a body; end the connection if it is
        more than may be kept."""
        is_free = self._waiter is not None and not self._waiter.done()
        body: StreamReader | None = None
        if self._messages:
            body = self._messages[-1][1]
        elif self._current_request is not None:
            body = self._current_request.content
        num_body_bytes: int = -1
        if body is not None:  # as they came, where aiohttp can tell: one may decompress to nothing
            num_body_bytes = getattr(body, "total_raw_bytes", body.total_bytes)
        progress = self._request_count, num_body_bytes
        is_thrown_away = body is None and not is_free
        if progress != self._progress or is_thrown_away:
            self._progress, self._num_head_bytes = progress, 0
            return False
        self._num_head_bytes += num_bytes
        limit = _HEADS * self._limits.max_header_bytes
        if self._num_head_bytes <= limit or self.transport is None:
            return False
        if is_free:
            message = f"headers: expected at most {limit} bytes together, got more"
            self._end(431, message, "malformed_http")
        else:
            self.transport.abort()
        return True

    def _head_is_late(self) -> None:
        self._head_timer = None
        timeout_s = self._limits.header_timeout_s
        self._end(408, f"headers: expected all of them within {timeout_s:g} s", "header_timeout")

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _end(self, status: int, message: str, code: str) -> None:
        """Answer a connection on which there is no request, and close it."""
        if self.transport is not None:
            body = error_json(status, message, code=code)
            head = (
                f"HTTP/1.1 {status} {_PHRASES[status]}\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
            )
            self.transport.write(head.encode() + body)
        self.force_close()

    def log_exception(self, *args: Any, **kw: Any) -> None:
        """Log what went wrong here; what clients do wrong is theirs to know."""
        if isinstance(kw.get("exc_info"), web.RequestPayloadError):
            _logger.debug("a body was not framed or compressed as announced")
        else:
            super().log_exception(*args, **kw)

    async def finish_response(
        self,
        request: web.BaseRequest,
        resp: web.StreamResponse,
        start_time: float | None,
    ) -> tuple[web.StreamResponse, bool]:
        """Write an answer; one that aiohttp made itself, in OpenAI's form.

        It is the last one on a connection whose client was let in by what no longer counts.
        """
        if isinstance(resp, web.HTTPException) and not request.writer.output_size:
            resp = error_response(
                resp.status, f"request: expected one that is known here, got {resp.reason}"
            )
        if self._trust != self._listener.num_trusts:
            resp.force_close()
        transport = self.transport
        finished = await super().finish_response(request, resp, start_time)
        if transport is not None and self._rest_timer is None:
            self._look_at_rest(transport)
        return finished

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Return what a client gets for a request that is no HTTP, or that broke a handler."""
        if request.writer.output_size > 0:
            raise ConnectionError("an answer has begun, so no other one can be given")
        if isinstance(exc, http_exceptions.HttpProcessingError):
            status, text = _refusal(exc, self._limits)
            _logger.debug("refused a request: %s", text)
            response = error_response(status, text, code="malformed_http")
        else:
            _logger.error("a call failed", exc_info=exc)
            response = error_response(status, "the router failed at this call")
        response.force_close()
        return response


class Listener:
    """An application on an address.

    Args:
        app: Answers what is no plain call.
        limits: Of connections.
        bodies: Keeps account of what is held of requests.
        tls: That connections are taken with; None: in plain text.
        grace_s: How long calls under way may take to end when it closes.
        calls: What answers plain calls, by path.
        hand_over: Called when that time is over, to have calls end at once.
    """

    def __init__(
        self,
        app: web.Application,
        limits: LimitsConfig,
        bodies: Bodies,
        tls: RenewableTls | None,
        *,
        grace_s: float,
        calls: Mapping[str, Handle] | None = None,
        hand_over: Callable[[], None] = lambda: None,
    ) -> None:
        self.handles = {
            f"POST {path} HTTP/1.1".encode(): handle for path, handle in (calls or {}).items()
        }
        """By request line."""
        self.plain: set[PlainConnection] = set()
        self.is_ending = False
        """Whether every answer is the last one on its connection."""
        self.limits = limits
        """May be replaced: connections made from then on have the new ones."""
        self.grace_s = grace_s
        """May be replaced."""
        self.num_connections = 0
        self.num_trusts = 0
        """To be raised when clients that were let in may be no more: each connection made before
        ends with its next answer."""
        self.bodies = bodies
        self._handshakes = None if tls is None else Handshakes(tls)
        self._hand_over = hand_over
        self._runner = web.AppRunner(app, handler_cancellation=True, access_log=None)

    @property
    def server(self) -> web.Server:
        assert self._runner.server is not None
        return self._runner.server

    @asynccontextmanager
    async def listening(
        self, host: str, port: int, *, where: str = "host, port"
    ) -> AsyncIterator[str]:
        """Serve while the block runs; yields the url.

        Raises:
            ConfigError: The address cannot be listened on.
        """
        await self._runner.setup()
        loop = asyncio.get_running_loop()
        try:
            try:
                server = await loop.create_server(self._arrival, host, port, backlog=1024)
            except OSError as e:
                raise ConfigError(
                    f"{where}: cannot listen on {host}:{port}: {e.strerror}"
                ) from None
            address, number = server.sockets[0].getsockname()[:2]
            name = f"[{address}]" if ":" in address else address
            try:
                yield f"{'http' if self._handshakes is None else 'https'}://{name}:{number}"
            finally:
                server.close()
                await self._end_connections()
        finally:
            await self._runner.cleanup()

    def _arrival(self) -> asyncio.Protocol:
        return self._protocol() if self._handshakes is None else Arrival(self._begin_handshake)

    def _begin_handshake(self, arrived: asyncio.BaseTransport) -> None:
        assert self._handshakes is not None
        num_connections = self.num_connections + len(self._handshakes)
        if self.is_ending or num_connections >= self.limits.max_connections:
            abort(arrived)
            return
        timeout_s = self.limits.header_timeout_s
        self._handshakes.begin(arrived, self._protocol, timeout_s=timeout_s)

    def _protocol(self) -> asyncio.Protocol:
        if self.handles:
            plain = PlainConnection(self, asyncio.get_running_loop())
            return cast("asyncio.Protocol", plain)
        return self.aiohttp_protocol(self.num_trusts)

    def aiohttp_protocol(self, num_trusts: int) -> Protocol:
        """Return what reads all that clients may send.

        Args:
            num_trusts: As it was when the connection was made.
        """
        return Protocol(self, num_trusts, loop=asyncio.get_running_loop())

    async def _end_connections(self) -> None:
        """Let calls under way end, for as long as they may."""
        await asyncio.sleep(0)  # what has been sent up to now is begun
        self.is_ending = True
        self.server.pre_shutdown()
        until_late = asyncio.get_running_loop().call_later(self.grace_s, self._hand_over)
        most_s = self.grace_s + _LAST_WORDS_S
        try:
            await asyncio.gather(
                self._end_plain(most_s), self.server.shutdown(most_s), self._end_handshakes()
            )
        finally:
            until_late.cancel()

    async def _end_handshakes(self) -> None:
        if self._handshakes is not None:
            await self._handshakes.end()

    async def _end_plain(self, most_s: float) -> None:
        loop = asyncio.get_running_loop()
        until = loop.time() + most_s
        for connection in list(self.plain):
            connection.end()
        tasks = [
            connection.task
            for connection in self.plain
            if connection.task is not None and connection.is_answering
        ]
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=most_s)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        ends = [connection.lost() for connection in self.plain if connection.is_sending]
        if ends:
            await asyncio.wait(ends, timeout=max(0.0, until - loop.time()))
        for connection in list(self.plain):
            connection.abort()


def _refusal(error: http_exceptions.HttpProcessingError, limits: LimitsConfig) -> tuple[int, str]:
    """Return status and words for what the parser did not take."""
    text = error.message or ""
    if isinstance(error, http_exceptions.LineTooLong):
        return 431, f"headers: expected at most {limits.max_header_bytes} bytes each, got more"
    if "Too many headers" in text:
        return 431, f"headers: expected at most {limits.max_headers}, got more"
    if isinstance(error, http_exceptions.InvalidHeader):
        return 400, "headers: expected values as HTTP has them, got one that is not"
    if isinstance(error, http_exceptions.InvalidURLError | http_exceptions.BadStatusLine):
        return 400, "request line: expected METHOD PATH HTTP/1.1, got something else"
    # llhttp's own first line says what was wrong; what follows quotes the bytes.
    reason = text.partition("\n")[0].rstrip(":")
    return 400, f"request: expected HTTP/1.1, got an error: {reason:.120}"
