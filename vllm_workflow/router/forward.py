"""Forwards a call to one instance, and its answer to the client."""

from __future__ import annotations

import asyncio
import errno
import math
import time
from collections.abc import Callable
from functools import partial

from vllm_workflow.core.ordering import OrderingPolicy
from vllm_workflow.router.answer import (
    Ending,
    Passing,
    check_whole,
    error_at_start,
    held_bytes,
    is_aborted,
    is_event_stream,
)
from vllm_workflow.router.attempt import MISSING, Attempt, Refusal, read_refusal
from vllm_workflow.router.call import Call, forwarded_body
from vllm_workflow.router.connection import Connection
from vllm_workflow.router.errors import BrokenOffError, LostError, RequestError
from vllm_workflow.router.exchange import Answer, Reply
from vllm_workflow.router.metrics import Metrics
from vllm_workflow.router.pool import Pool
from vllm_workflow.router.tries import is_refusal
from vllm_workflow.router.upstream import Upstream
from vllm_workflow.router.upstreams import Upstreams
from vllm_workflow.router.usage import MAX_USAGE_BYTES

_UNAUTHORIZED = 401
_SUSPICIOUS = frozenset({"closed", "disconnected", "aborted", "unauthorized"})
_OUT_OF_SOCKETS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS})
"""The router's own shortage, which no instance is to blame for."""


class Forwarder:
    """Sends calls on.

    Args:
        upstreams: Where to, and who watches them.
        metrics: Told of answers that broke off.
        ordering: Returns what gives the `priority` to add, now; None: none is to be added.
    """

    def __init__(
        self,
        upstreams: Upstreams,
        metrics: Metrics,
        ordering: Callable[[], OrderingPolicy | None],
    ) -> None:
        self._upstreams = upstreams
        self._metrics = metrics
        self._ordering = ordering

    async def forward(
        self, reply: Reply, call: Call, attempt: Attempt, *, fresh: bool
    ) -> Answer | Refusal:
        """Forward the call and pass the answer on, or return why another one is to be asked.

        Args:
            reply: To answer as bytes come, where the answer is a stream, or large.
            call: What to forward.
            attempt: Where to; told how it goes.
            fresh: Take no kept connection.

        Raises:
            LostError: Before the client got anything, so another instance can be asked.
        """
        upstream = self._upstreams[attempt.instance_id]
        silence, pool = upstream.silence, upstream.pool
        connection: Connection | None = None
        passing: Passing | None = None
        silence.begin(attempt)
        try:
            connection = None if fresh else pool.kept()
            if connection is None:
                connection = await self._connected(pool, attempt)
            try:
                rest = self._ask(connection, upstream, call, attempt)
                if not connection.is_sent:
                    await connection.send_rest(rest)
                await connection.begun()
            except BrokenOffError:
                kept = not (fresh or connection.has_head)
                raise LostError("closed" if kept else "disconnected") from None
            first = connection.taken()
            if connection.status == _UNAUTHORIZED and upstream.own_headers:
                raise LostError("unauthorized")
            if is_refusal(connection.status):
                refusal = await read_refusal(attempt.instance_id, connection, first)
                if refusal.status == MISSING:
                    self._upstreams.suspect(attempt.instance_id)
                return refusal
            if is_event_stream(connection.headers) and (
                error := error_at_start(attempt.instance_id, first, connection.headers)
            ):
                return error
            if connection.is_complete and held_bytes(connection.status, connection.headers):
                check_whole(connection, first)
                attempt.ok = 200 <= connection.status < 300
                attempt.usage.add(first[-MAX_USAGE_BYTES:])
                return self._answer(call, attempt, connection, first)
            if is_aborted(first):
                raise LostError("aborted")
            answer = self._answer(call, attempt, connection, None)
            attempt.is_begun = True
            passing = Passing(attempt, silence, reply, _ending(call, connection))
            async with asyncio.timeout(None) as patience:
                attempt.give_up = partial(_end, patience)
                await passing.run(answer, connection, first)
        except TimeoutError:
            if passing is None:
                raise LostError("hung") from None
        except LostError as e:
            if e.reason in _SUSPICIOUS:
                self._upstreams.suspect(attempt.instance_id)
            raise
        finally:
            attempt.give_up = None
            if connection is not None:
                pool.give_back(connection)
            silence.end(attempt)
        assert passing is not None
        attempt.ok = passing.is_whole and 200 <= answer.status < 300
        if not passing.is_whole:
            self._upstreams.suspect(attempt.instance_id)
            self._metrics.broken(attempt.instance_id)
            await passing.break_off()
        return answer

    async def _connected(self, pool: Pool, attempt: Attempt) -> Connection:
        """Return a new connection.

        Raises:
            LostError: None can be made.
        """
        patience = asyncio.timeout(None)
        attempt.give_up = partial(_end, patience)
        try:
            async with patience:
                return await pool.connect()
        except OSError as e:
            if patience.expired():
                raise LostError("hung") from None
            if e.errno in _OUT_OF_SOCKETS:
                raise RequestError(
                    "the router has no file descriptors left", status=503, code="overloaded"
                ) from None
            self._upstreams.refused(attempt.instance_id)
            raise LostError("refused") from None

    def _ask(
        self, connection: Connection, upstream: Upstream, call: Call, attempt: Attempt
    ) -> bytes:
        """Begin to send the call; returns its body, which `send_rest` may have to send."""
        body = forwarded_body(
            call,
            attempt.decision,
            self._ordering(),
            now=attempt.start_time,
            unix_time=time.time(),
            has_session=bool(upstream.config.kv_events),
        )
        head = upstream.pool.head(call.path, upstream.headers(call.headers), len(body))
        attempt.give_up = connection.abandon
        heard = partial(upstream.silence.heard, attempt)
        connection.send(head, body, heard=heard, hold=held_bytes)
        return body

    def _answer(
        self, call: Call, attempt: Attempt, upstream: Connection, body: bytes | None
    ) -> Answer:
        headers, decision = upstream.headers, attempt.decision
        headers.remove("connection")  # of the hop behind
        headers.set("X-Request-Id", call.request_id)
        headers.set("X-Workflow-Instance", decision.chosen.instance_id)
        queue_s = attempt.start_time - call.request.arrival_time
        headers.set("X-Workflow-Queue-Ms", f"{1000.0 * queue_s:.1f}")
        if math.isfinite(decision.slack_s):
            headers.set("X-Workflow-Slack-Ms", f"{1000.0 * decision.slack_s:.0f}")
        return Answer(upstream.status, headers, body, upstream.reason)


def _end(patience: asyncio.Timeout) -> None:
    patience.reschedule(asyncio.get_running_loop().time())


def _ending(call: Call, upstream: Connection) -> Ending:
    if not call.body.stream or upstream.status != 200 or not is_event_stream(upstream.headers):
        return Ending.FRAMING
    path = call.path.partition("?")[0]
    if path.endswith("/completions"):
        return Ending.DONE
    return Ending.FINAL_EVENT if path.endswith("/responses") else Ending.FRAMING
