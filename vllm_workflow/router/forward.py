"""Forwards a call to one instance, and its answer to the client."""

from __future__ import annotations

import asyncio
import errno
import math
import time
from collections.abc import Callable, Mapping
from io import BytesIO
from typing import NamedTuple

import aiohttp
from aiohttp import web
from multidict import CIMultiDict
from yarl import URL

from vllm_workflow.core.ordering import OrderingPolicy
from vllm_workflow.router.answer import Held, Passing, error_at_start, is_event_stream
from vllm_workflow.router.attempt import (
    BROKEN_OFF,
    MISSING,
    Attempt,
    LostError,
    Refusal,
    read_refusal,
)
from vllm_workflow.router.call import Call, forwarded_body, response_headers
from vllm_workflow.router.errors import RequestError
from vllm_workflow.router.metrics import Metrics
from vllm_workflow.router.tries import is_refusal
from vllm_workflow.router.upstream import Upstream
from vllm_workflow.router.upstreams import Upstreams
from vllm_workflow.router.usage import MAX_USAGE_BYTES

_LARGE_BODY_BYTES = 1 << 20
"""From here on the client library wants a file, to write it in pieces."""
ADDED_BY_AIOHTTP = ("Accept", "Accept-Encoding", "User-Agent", "Content-Type")
"""To be added to no call; said once to a session, that costs nothing per call."""
_OUT_OF_SOCKETS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS})
"""The router's own shortage, which no instance is to blame for."""
_REFUSED = (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError)


class Sessions(NamedTuple):
    """Connections to instances; both add none of `ADDED_BY_AIOHTTP`."""

    kept: aiohttp.ClientSession
    fresh: aiohttp.ClientSession
    """Makes a new one each time: a kept one may be closed by the server just now."""


class Forwarder:
    """Sends calls on.

    Args:
        upstreams: Where to, and who watches them.
        sessions: By which connections.
        metrics: Told of answers that broke off.
        ordering: Returns what gives the `priority` to add, now; None: none is to be added.
    """

    def __init__(
        self,
        upstreams: Upstreams,
        sessions: Sessions,
        metrics: Metrics,
        ordering: Callable[[], OrderingPolicy | None],
    ) -> None:
        self._upstreams = upstreams
        self._sessions = sessions
        self._metrics = metrics
        self._ordering = ordering

    async def forward(
        self, request: web.Request | None, call: Call, attempt: Attempt, *, fresh: bool
    ) -> web.StreamResponse | Refusal:
        """Forward the call and pass the answer on, or return why another one is to be asked.

        Args:
            request: To answer as bytes come; None: the answer is returned whole.
            call: What to forward.
            attempt: Where to; told how it goes.
            fresh: Take no kept connection.

        Raises:
            LostError: Before the client got anything, so another instance can be asked.
        """
        upstream = self._upstreams[attempt.instance_id]
        silence = upstream.silence
        answer: aiohttp.ClientResponse | None = None
        passing: Passing | None = None
        silence.begin(attempt)
        try:
            async with asyncio.timeout(None) as attempt.patience:
                answer = await self._sent(upstream, call, attempt, fresh=fresh)
                first = await _first(answer)
                silence.heard(attempt)
                refusal = await _refusal(attempt, answer, first)
                if refusal is not None:
                    if refusal.status == MISSING:
                        self._upstreams.suspect(attempt.instance_id)
                    return refusal
                if request is None or not is_event_stream(answer.headers):
                    held = Held(answer, first)
                    if await held.read(attempt, silence, unbounded=request is None):
                        attempt.ok = 200 <= answer.status < 300
                        attempt.usage.add(held.body[-MAX_USAGE_BYTES:])
                        return self._whole(call, attempt, answer, held.body)
                    first = held.body
                assert request is not None
                response = web.StreamResponse(
                    status=answer.status,
                    reason=answer.reason,
                    headers=self._headers(answer.headers, call, attempt),
                )
                attempt.is_begun = True
                passing = Passing(attempt, silence, response)
                await response.prepare(request)
                await passing.run(answer, first, wants_done=_ends_with_done(call, answer))
        except TimeoutError:
            if passing is None:
                raise LostError("hung") from None
        except LostError as e:
            if e.reason in {"closed", "disconnected"}:
                self._upstreams.suspect(attempt.instance_id)
            raise
        finally:
            attempt.patience = None
            if answer is not None:
                answer.close()
            silence.end(attempt)
        assert passing is not None
        assert request is not None
        attempt.ok = passing.is_whole and 200 <= passing.response.status < 300
        if not passing.is_whole:
            self._upstreams.suspect(attempt.instance_id)
            self._metrics.broken(attempt.instance_id)
            await passing.break_off(request)
        return passing.response

    async def _sent(
        self, upstream: Upstream, call: Call, attempt: Attempt, *, fresh: bool
    ) -> aiohttp.ClientResponse:
        """Forward the call; return the answer, to be closed, when its headers are there.

        Raises:
            LostError: They did not come.
        """
        try:
            return await self._post(upstream, call, attempt, fresh=fresh)
        except _REFUSED as e:
            if isinstance(e, OSError) and e.errno in _OUT_OF_SOCKETS:
                raise RequestError(
                    "the router has no file descriptors left", status=503, code="overloaded"
                ) from None
            self._upstreams.refused(attempt.instance_id)
            raise LostError("refused") from None
        except BROKEN_OFF:
            raise LostError("disconnected" if fresh else "closed") from None

    async def _post(
        self, upstream: Upstream, call: Call, attempt: Attempt, *, fresh: bool
    ) -> aiohttp.ClientResponse:
        body = forwarded_body(
            call,
            attempt.decision,
            self._ordering(),
            now=attempt.start_time,
            unix_time=time.time(),
        )
        session = self._sessions.fresh if fresh else self._sessions.kept
        return await session.post(
            URL(upstream.url + call.path, encoded=True),
            data=body if len(body) < _LARGE_BODY_BYTES else BytesIO(body),
            headers=upstream.headers(call.headers),
            ssl=upstream.ssl,
            allow_redirects=False,
        )

    def _whole(
        self, call: Call, attempt: Attempt, upstream: aiohttp.ClientResponse, body: bytes
    ) -> web.Response:
        """Return an answer that was held."""
        return web.Response(
            status=upstream.status,
            reason=upstream.reason,
            headers=self._headers(upstream.headers, call, attempt),
            body=body,
        )

    def _headers(
        self, headers: Mapping[str, str], call: Call, attempt: Attempt
    ) -> CIMultiDict[str]:
        result = response_headers(headers)
        decision = attempt.decision
        result["X-Request-Id"] = call.request_id
        result["X-Workflow-Instance"] = decision.chosen.instance_id
        queue_s = attempt.start_time - call.request.arrival_time
        result["X-Workflow-Queue-Ms"] = f"{1000.0 * queue_s:.1f}"
        if math.isfinite(decision.slack_s):
            result["X-Workflow-Slack-Ms"] = f"{1000.0 * decision.slack_s:.0f}"
        return result


async def _first(answer: aiohttp.ClientResponse) -> bytes:
    """Return the first bytes of a body, empty if it has none.

    Raises:
        LostError: It broke off before.
    """
    try:
        return await answer.content.readany()
    except BROKEN_OFF:
        raise LostError("disconnected") from None


async def _refusal(
    attempt: Attempt, upstream: aiohttp.ClientResponse, first: bytes
) -> Refusal | None:
    """Return the answer if it is one after which another instance is asked."""
    if is_refusal(upstream.status):
        return await read_refusal(attempt.instance_id, upstream, first)
    if is_event_stream(upstream.headers):
        return error_at_start(attempt.instance_id, first, CIMultiDict(upstream.headers))
    return None


def _ends_with_done(call: Call, upstream: aiohttp.ClientResponse) -> bool:
    return (
        call.body.stream
        and upstream.status == 200
        and is_event_stream(upstream.headers)
        and call.path.partition("?")[0].endswith("/completions")
    )
