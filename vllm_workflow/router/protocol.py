"""HTTP as the router speaks it to clients: errors in OpenAI's form, and bounded patience.

What cannot be read as HTTP (headers too long, two lengths, a length that is no number) is refused
by the parser; here it gets its words. The words do not repeat what came, which may be a key.
"""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from typing import TYPE_CHECKING, Any

from aiohttp import StreamReader, http_exceptions, web

from vllm_workflow.router.errors import error_json, error_response
from vllm_workflow.router.limits import LimitsConfig
from vllm_workflow.router.plain_connection import LINGERING_S, MAX_AHEAD_BYTES

if TYPE_CHECKING:
    from vllm_workflow.router.listener import Listener

_logger = logging.getLogger(__name__)
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
