"""Relays one OpenAI-compatible call to the instance that the dispatcher chose."""

from __future__ import annotations

import asyncio
import errno
import itertools
import logging
import math
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from io import BytesIO

import aiohttp
from aiohttp import web
from multidict import CIMultiDict
from yarl import URL

from vllm_workflow.core.dispatcher import Dispatcher
from vllm_workflow.core.errors import NoInstanceError
from vllm_workflow.core.types import Decision, StageRequest
from vllm_workflow.router.attempt import (
    BROKEN,
    BROKEN_OFF,
    BUSY,
    Attempt,
    LostError,
    Tries,
    read_refusal,
)
from vllm_workflow.router.auth import Access, admitted
from vllm_workflow.router.binder import Binder
from vllm_workflow.router.body import parse
from vllm_workflow.router.call import Call, forwarded_body, request_headers, response_headers
from vllm_workflow.router.dialects import read_run
from vllm_workflow.router.errors import RequestError, error_json, error_response
from vllm_workflow.router.limits import Bodies, BodyReader
from vllm_workflow.router.metrics import Metrics
from vllm_workflow.router.prefixes import head_of
from vllm_workflow.router.runs import Runs
from vllm_workflow.router.upstreams import Upstream, Upstreams
from vllm_workflow.router.usage import Usage

RETRY_AFTER_S = 1
_CLIENT_LEFT = 499
_LARGE_BODY_BYTES = 1 << 20
"""From here on the client library wants a file, to write it in pieces."""
_ADDED_BY_AIOHTTP = ("Accept", "Accept-Encoding", "User-Agent", "Content-Type")
_OUT_OF_SOCKETS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS})
"""The router's own shortage, which no instance is to blame for."""
_prompts = logging.getLogger("vllm_workflow.prompts")
_REFUSED = (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError)


class Proxy:
    """Handles the calls of all endpoints; owned by one event loop.

    A call holds two things, its run and the reservation of the attempt under way. Each is
    let go in one `finally`, however the call ends; a client that leaves cancels `handle`,
    which closes the connection to the instance, which aborts the request there.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        binder: Binder,
        upstreams: Upstreams,
        session: aiohttp.ClientSession,
        metrics: Metrics,
        *,
        access: Access,
        bodies: Bodies,
        set_priority: bool = False,
        log_prompts: bool = False,
    ) -> None:
        self._dispatcher = dispatcher
        self._binder = binder
        self._upstreams = upstreams
        self._session = session
        self._metrics = metrics
        self._ordering = dispatcher.config.build_ordering() if set_priority else None
        self._access = access
        self._bodies = bodies
        self.log_prompts = log_prompts
        self._ids = itertools.count(1)
        self.runs = Runs(metrics.run_ended)

    async def handle(self, request: web.Request, *, takes_xargs: bool) -> web.StreamResponse:
        """Answer one call.

        Args:
            request: From the client.
            takes_xargs: Whether the endpoint knows `vllm_xargs` and `priority`.
        """
        stage, instance_id, status = "", "", _CLIENT_LEFT
        try:
            with self._bodies.held() as reader:
                call = await self._read(request, reader, time.monotonic(), takes_xargs=takes_xargs)
                stage = call.info.stage
                response = await self._in_run(request, call)
            instance_id = response.headers.get("X-Workflow-Instance", "")
        except RequestError as e:
            response = e.response()
        except ConnectionResetError:  # it left while the answer was written to it
            return web.Response()
        except Exception:
            status = 500
            raise
        else:
            status = response.status
        finally:
            if status == _CLIENT_LEFT:
                self._metrics.client_left()
            self._metrics.answered(instance_id, stage, status)
        return response

    async def _read(
        self, request: web.Request, reader: BodyReader, now: float, *, takes_xargs: bool
    ) -> Call:
        caller = self._access.caller(request.headers)
        headers, request_id = request_headers(request.headers)
        if caller is not None:
            headers.popall("Authorization")  # for the router; instances have keys of their own
        body = parse(await reader.read(request))
        info = read_run(request.headers, body.members)
        info = admitted(caller, info, request.headers, body.members, body.model)
        if self.log_prompts:
            _prompts.info("%s %s: %s", request_id, info.tenant_id, body.raw.decode())
        fleet = self._dispatcher.fleet
        if not fleet.serves(body.model):
            served = sorted({model for instance in fleet for model in instance.models})
            raise RequestError(
                f"model: {body.model!a:.256} is not served here; served are {served}",
                status=404,
                param="model",
                code="model_not_found",
            )
        stage_request = StageRequest(
            request_id=f"{request_id}#{next(self._ids)}",
            arrival_time=now,
            workflow_id=info.workflow_id,
            workflow=info.workflow,
            stage=info.stage,
            tenant_id=info.tenant_id,
            model=body.model,
            priority=info.priority or 0,
            final=info.final,
        )
        return Call(
            path=request.rel_url.raw_path_qs,
            headers=headers,
            body=body,
            info=info,
            request=stage_request,
            request_id=request_id,
            takes_xargs=takes_xargs,
        )

    async def _in_run(self, request: web.Request, call: Call) -> web.StreamResponse:
        """Relay the call as part of its run."""
        run = self.runs.begin(call.info, call.request.arrival_time)
        ok = False
        try:
            predicted = self._dispatcher.predict(
                call.request._replace(
                    workflow=call.info.workflow or run.workflow,
                    deadline=run.deadline,
                    run_arrival_time=run.arrival_time,
                ),
                num_prompt_bytes=len(call.body.raw),
                max_tokens=call.body.max_tokens if call.takes_xargs else 1,
                head=head_of(call.body.members) if call.takes_xargs else (),
            )
            if call.info.expected_output_tokens is not None:
                most = call.body.max_tokens or math.inf
                predicted = predicted._replace(
                    expected_output_tokens=min(call.info.expected_output_tokens, most)
                )
            response, ok = await self._relay(request, replace(call, request=predicted))
            return response
        finally:
            self.runs.end(call.info, run, time.monotonic(), ok=ok)

    async def _relay(self, request: web.Request, call: Call) -> tuple[web.StreamResponse, bool]:
        """Ask instances until one answers; then stay with it. Returns whether it ended well."""
        tries = Tries()
        while tries.may_go_on:
            try:
                decision = await self._binder.bind(
                    call.request,
                    num_prompt_bytes=len(call.body.raw),
                    exclude=tries.excluded,
                )
            except NoInstanceError:
                break
            with self._reserved(call, decision) as attempt:
                try:
                    async with self._sent(call, attempt) as (upstream, first):
                        if upstream.status not in BUSY and upstream.status not in BROKEN:
                            response = await self._answer(request, call, attempt, upstream, first)
                            return response, attempt.ok
                        tries.refused(await read_refusal(attempt.instance_id, upstream, first))
                        self._metrics.failed_over(attempt.instance_id, str(upstream.status))
                except LostError as e:
                    tries.lost(attempt.instance_id, e.reason)
                    self._metrics.failed_over(attempt.instance_id, e.reason)
        return self._give_up(call, tries), False

    @contextmanager
    def _reserved(self, call: Call, decision: Decision) -> Iterator[Attempt]:
        """Hold the reservation for exactly as long as the block runs, however it ends."""
        now = time.monotonic()
        attempt = Attempt(decision, now, Usage(stream=call.body.stream))
        self._metrics.dispatched(decision, now - call.request.arrival_time)
        try:
            yield attempt
        finally:
            outcome = attempt.outcome(time.monotonic())
            self._binder.settle(outcome)
            self._metrics.settled(decision, outcome)

    @asynccontextmanager
    async def _sent(
        self, call: Call, attempt: Attempt
    ) -> AsyncIterator[tuple[aiohttp.ClientResponse, bytes]]:
        """Forward the call; give the answer with its first bytes, close it at the end.

        Raises:
            LostError: Before the first byte of the body, so another instance can be asked.
        """
        upstream = self._upstreams[attempt.instance_id]
        try:
            async with asyncio.timeout(None) as patience:
                with upstream.waiting(patience):
                    answer, first = await self._post(upstream, call, attempt)
        except _REFUSED as e:
            if isinstance(e, OSError) and e.errno in _OUT_OF_SOCKETS:
                raise RequestError(
                    "the router has no file descriptors left", status=503, code="overloaded"
                ) from None
            self._upstreams.refused(attempt.instance_id)
            raise LostError("refused") from None
        except TimeoutError:
            raise LostError("hung") from None
        except BROKEN_OFF:
            self._upstreams.suspect(attempt.instance_id)
            raise LostError("disconnected") from None
        attempt.first_byte_time = time.monotonic()
        try:
            yield answer, first
        finally:
            answer.close()

    async def _post(
        self, upstream: Upstream, call: Call, attempt: Attempt
    ) -> tuple[aiohttp.ClientResponse, bytes]:
        body = forwarded_body(
            call,
            attempt.decision,
            self._ordering,
            now=attempt.start_time,
            unix_time=time.time(),
        )
        answer = await self._session.post(
            URL(upstream.url + call.path, encoded=True),
            data=body if len(body) < _LARGE_BODY_BYTES else BytesIO(body),
            headers=upstream.headers(call.headers),
            ssl=upstream.ssl,
            skip_auto_headers=_ADDED_BY_AIOHTTP,
            allow_redirects=False,
        )
        try:
            return answer, await answer.content.readany()
        except BaseException:
            answer.close()
            raise

    async def _answer(
        self,
        request: web.Request,
        call: Call,
        attempt: Attempt,
        upstream: aiohttp.ClientResponse,
        chunk: bytes,
    ) -> web.StreamResponse:
        """Pass the answer on as it comes; its end is written when all is let go."""
        response = web.StreamResponse(
            status=upstream.status,
            reason=upstream.reason,
            headers=self._headers(upstream.headers, call, attempt),
        )
        await response.prepare(request)
        while chunk:
            attempt.usage.add(chunk)
            begin = time.monotonic()
            await response.write(chunk)
            attempt.write_s += time.monotonic() - begin
            try:
                chunk = await upstream.content.readany()
            except BROKEN_OFF:
                await self._break_off(request, response, attempt)
                return response
        attempt.ok = 200 <= upstream.status < 300
        return response

    async def _break_off(
        self, request: web.Request, response: web.StreamResponse, attempt: Attempt
    ) -> None:
        """Let the client know that what it has is not the whole answer.

        A stream gets an error event. Then the connection is closed without the end that its
        framing asks for, so that no client can take the answer for a complete one.
        """
        self._upstreams.suspect(attempt.instance_id)
        self._metrics.broken(attempt.instance_id)
        if response.headers.get("Content-Type", "").startswith("text/event-stream"):
            error = error_json(
                502, f"instance {attempt.instance_id} broke off its answer", code="upstream_lost"
            )
            begin = b"data: " if attempt.usage.ends_event else b"\n\ndata: "
            await response.write(begin + error + b"\n\n")
        if request.transport is not None:
            request.transport.close()

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

    def _give_up(self, call: Call, tries: Tries) -> web.Response:
        """Answer for a fleet of which no instance could: with its own last word, if any."""
        if tries.refusal is None:
            reason = "; ".join(tries.reasons) or "none is healthy"
            return error_response(
                503,
                f"no instance can serve model {call.body.model!a:.256} now ({reason})",
                code="no_instance",
                headers={"X-Request-Id": call.request_id, "Retry-After": str(RETRY_AFTER_S)},
            )
        refusal = tries.refusal
        headers = response_headers(refusal.headers)
        headers["X-Request-Id"] = call.request_id
        headers["X-Workflow-Instance"] = refusal.instance_id
        if refusal.status in BUSY:
            headers.setdefault("Retry-After", str(RETRY_AFTER_S))
        return web.Response(status=refusal.status, body=refusal.body, headers=headers)
