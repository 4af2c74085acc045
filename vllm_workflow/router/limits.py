"""How much of the router one client may take: sizes, times, and memory for bodies."""

from __future__ import annotations

import asyncio
from typing import Annotated

from aiohttp import web
from pydantic import Field

from vllm_workflow.router.errors import RequestError
from vllm_workflow.router.exchange import Exchange
from vllm_workflow.yaml_config import Strict

RETRY_AFTER_S = 1


class LimitsConfig(Strict):
    """What clients may send, and how slowly."""

    max_header_bytes: Annotated[int, Field(ge=512, le=1 << 20)] = 8190
    """Of the request line, and of each header; eight times that of all of them. More is answered
    with 431."""
    max_headers: Annotated[int, Field(ge=8, le=10_000)] = 128
    """More are answered with 431."""
    max_bodies_mb: Annotated[float, Field(gt=0)] = 512.0
    """Bodies of all calls under way together, and what was sent ahead of its turn; a call beyond
    it is answered with 429, who sends ahead beyond it is cut off."""
    max_connections: Annotated[int, Field(ge=1)] = 10_000
    """Of clients, at a time; further ones are answered with 503 and closed, with TLS closed at
    once. Handshakes under way count."""
    header_timeout_s: Annotated[float, Field(gt=0, le=3600)] = 20.0
    """From the first byte of a request until its headers are there; then 408. For a TLS handshake,
    too; it is closed then."""
    body_timeout_s: Annotated[float, Field(gt=0, le=3600)] = 60.0
    """Until a body is there; then 408."""
    write_timeout_s: Annotated[float, Field(gt=0, le=3600)] = 60.0
    """An answer of which nothing is taken for this long is given up, and its connection closed."""
    idle_timeout_s: Annotated[float, Field(gt=0, le=3600)] = 75.0
    """A connection without a request is closed after this long."""


class Bodies:
    """Reads the bodies of requests and keeps account of the memory that they take."""

    def __init__(self, max_body_mb: float, limits: LimitsConfig) -> None:
        self._num_bytes = 0
        self.replace(max_body_mb, limits)

    def replace(self, max_body_mb: float, limits: LimitsConfig) -> None:
        """Take other limits from the next request on."""
        self._max_body_mb = max_body_mb
        self._limits = limits

    @property
    def num_bytes(self) -> int:
        """Held by calls under way."""
        return self._num_bytes

    def take(self, reader: BodyReader, num_bytes: int) -> None:
        """Count bytes of a body for a reader.

        Raises:
            RequestError: 413: more than one body may have; 429: more than there is for all.
        """
        self.hold(reader, num_bytes)
        if reader.num_bytes > 1e6 * self._max_body_mb:
            raise too_large(self._max_body_mb)

    def hold(self, reader: BodyReader, num_bytes: int) -> None:
        """Count memory for a reader.

        Raises:
            RequestError: 429: more than there is for all.
        """
        reader.num_bytes += num_bytes
        if not self.count(num_bytes):
            raise RequestError(
                "body: the router holds as many bytes of calls under way as it may",
                status=429,
                code="overloaded",
                headers={"Retry-After": str(RETRY_AFTER_S), "Connection": "close"},
            )

    def count(self, num_bytes: int) -> bool:
        """Count memory, or with a number below zero what is free again; returns whether all that
        is held is no more than may be."""
        self._num_bytes += num_bytes
        return self._num_bytes <= 1e6 * self._limits.max_bodies_mb

    def let_go(self, reader: BodyReader) -> None:
        """Count all of a reader's memory as free."""
        self._num_bytes -= reader.num_bytes
        reader.num_bytes = 0

    def check_length(self, num_bytes: int | None) -> None:
        """Refuse a body by its announced length, before any of it is read.

        Raises:
            RequestError: 413.
        """
        if num_bytes is not None and num_bytes > 1e6 * self._max_body_mb:
            raise too_large(self._max_body_mb, f"{num_bytes / 1e6:.1f} MB")

    @property
    def timeout_s(self) -> float:
        return self._limits.body_timeout_s


class BodyReader:
    """Reads one body; `Bodies.let_go` must follow."""

    def __init__(self, bodies: Bodies) -> None:
        self._bodies = bodies
        self.num_bytes = 0

    def hold(self, num_bytes: int) -> None:
        """Count what was made of the body, too.

        Raises:
            RequestError: 429.
        """
        self._bodies.hold(self, num_bytes)

    def whole(self, request: Exchange) -> bytes | None:
        """Return the body, decompressed, if all of it is here, as mostly; else `read` must follow.

        Raises:
            RequestError: 413 or 429.
        """
        self._bodies.check_length(request.content_length)
        body = request.whole()
        if body is not None:
            self._bodies.take(self, len(body))
        return body

    async def read(self, request: Exchange) -> bytes:
        """Wait for the body, and return it, decompressed.

        Raises:
            RequestError: 413, 429 or 408; 400 for one that is not framed or compressed as its
                headers say.
        """
        bodies = self._bodies
        chunks: list[bytes] = []
        try:
            async with asyncio.timeout(bodies.timeout_s):
                while chunk := await request.more():
                    bodies.take(self, len(chunk))
                    chunks.append(chunk)
        except TimeoutError:
            raise RequestError(
                f"body: expected all of it within {bodies.timeout_s:g} s, "
                f"got {self.num_bytes} bytes",
                status=408,
                code="body_timeout",
                headers={"Connection": "close"},
            ) from None
        except web.RequestPayloadError as e:
            raise RequestError(
                f"body: expected one as its headers announce it, got {_reason(e)}",
                headers={"Connection": "close"},
            ) from None
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def too_large(max_body_mb: float, got: str = "more") -> RequestError:
    return RequestError(
        f"body: expected at most {max_body_mb:g} MB, got {got}",
        status=413,
        headers={"Connection": "close"},
    )


def _reason(error: Exception) -> str:
    cause = error.__cause__ or error
    return f"{getattr(cause, 'message', None) or cause!s:.80}".split("\n")[0] or "less"
