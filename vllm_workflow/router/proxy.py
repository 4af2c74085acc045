"""Relays one OpenAI-compatible call to the instance that the dispatcher chose."""

from __future__ import annotations

import itertools
import logging
import math
import time
from functools import partial
from typing import TYPE_CHECKING

from vllm_workflow.core.dispatcher import Dispatcher
from vllm_workflow.core.errors import NoInstanceError, OverloadedError, QuotaExceededError
from vllm_workflow.core.ordering import OrderingPolicy
from vllm_workflow.core.types import Decision
from vllm_workflow.router.attempt import BROKEN, BUSY, Attempt, Refusal
from vllm_workflow.router.auth import Access, Caller, admitted
from vllm_workflow.router.binder import Binder
from vllm_workflow.router.body import VALUE_BYTES, parse
from vllm_workflow.router.call import Call, request_headers
from vllm_workflow.router.dialects import read_run
from vllm_workflow.router.errors import LostError, RequestError, error_answer
from vllm_workflow.router.exchange import Answer, Exchange, Reply
from vllm_workflow.router.forward import Forwarder
from vllm_workflow.router.headers import Headers
from vllm_workflow.router.limits import Bodies, BodyReader
from vllm_workflow.router.logs import calls
from vllm_workflow.router.metrics import Metrics
from vllm_workflow.router.once import Key, Once, key_of
from vllm_workflow.router.prefixes import head_of
from vllm_workflow.router.runs import Run, Runs
from vllm_workflow.router.spelling import Spelling
from vllm_workflow.router.tenants import quota_error
from vllm_workflow.router.tries import MIN_WAIT_S, Tries
from vllm_workflow.router.upstreams import Upstreams
from vllm_workflow.router.usage import Usage
from vllm_workflow.router.wire import labels_of

if TYPE_CHECKING:
    from vllm_workflow.router.board import Board
    from vllm_workflow.router.kv_events import KvEvents
    from vllm_workflow.router.tracing import Tracing

RETRY_AFTER_S = 1
_CLIENT_LEFT = 499
_prompts = logging.getLogger("vllm_workflow.prompts")


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
        metrics: Metrics,
        *,
        access: Access,
        bodies: Bodies,
        max_wait_s: float,
        set_priority: bool = False,
        log_prompts: bool = False,
        tracing: Tracing | None = None,
        kv_events: KvEvents | None = None,
        board: Board | None = None,
    ) -> None:
        self._dispatcher = dispatcher
        self._binder = binder
        self._upstreams = upstreams
        self._forwarder = Forwarder(upstreams, metrics, self._ordering)
        self.max_wait_s = max_wait_s
        """This, and the next two, may be replaced."""
        self.set_priority = set_priority
        self._metrics = metrics
        self._spelling = Spelling(metrics.unknown_name)
        self._access = access
        self._bodies = bodies
        self.log_prompts = log_prompts
        self._ids = itertools.count(1)
        self._tracing = tracing
        self._kv_events = kv_events
        self._board = board
        self.runs = Runs(self._run_ended)
        self.running = Once()
        self._is_stopping = False

    def hand_over(self) -> None:
        """Give up the calls that have not ended, so that their clients ask another router.

        Those whose answer has not begun get 503 with `Retry-After`, streams an error event.
        """
        self._is_stopping = True
        self._binder.hand_over()
        for upstream in self._upstreams:
            upstream.silence.abandon(begun=True)

    @property
    def policy(self) -> str:
        """Fingerprint of the policy that decides now."""
        return self._dispatcher.config.fingerprint

    def _ordering(self) -> OrderingPolicy | None:
        return self._dispatcher.config.build_ordering() if self.set_priority else None

    async def handle(self, exchange: Exchange, *, takes_xargs: bool) -> Answer:
        """Answer one call.

        Args:
            exchange: With the client.
            takes_xargs: Whether the endpoint knows `vllm_xargs` and `priority`.
        """
        stage, instance_id, status = "", "", _CLIENT_LEFT
        call, begin = None, time.monotonic()
        reader = BodyReader(self._bodies)
        try:
            # Who is refused for headers need not send a body.
            caller = self._access.caller(exchange.headers.get("authorization"))
            headers, request_id = request_headers(exchange.headers)
            raw = reader.whole(exchange)
            if raw is None:
                raw = await reader.read(exchange)
            call = self._read(
                exchange,
                caller,
                headers,
                request_id,
                raw,
                reader,
                begin,
                takes_xargs=takes_xargs,
            )
            info = call.info
            stage = info.stage
            known = key_of(exchange.headers, tenant_id=info.tenant_id, workflow_id=info.workflow_id)
            if known is None:
                answer = await self._in_run(exchange, call)
            else:
                answer = await self._once(exchange, call, known)
            instance_id = answer.headers.get("x-workflow-instance")
        except RequestError as e:
            answer = e.answer()
            status = answer.status
        except ConnectionResetError:  # it left while the answer was written to it
            return Answer(_CLIENT_LEFT, Headers(), b"")
        except Exception:
            status = 500
            raise
        else:
            status = answer.status
        finally:
            self._bodies.let_go(reader)
            if status == _CLIENT_LEFT:
                self._metrics.client_left()
            self._metrics.answered(instance_id, stage, status)
            if calls.isEnabledFor(logging.INFO):
                _log_call(call, exchange.headers, instance_id, status, begin)
        return answer

    def _read(
        self,
        request: Exchange,
        caller: Caller | None,
        headers: Headers,
        request_id: str,
        raw: bytes,
        reader: BodyReader,
        now: float,
        *,
        takes_xargs: bool,
    ) -> Call:
        if caller is not None:
            # For the router; instances have keys of their own. `Connection` may have named it.
            headers.remove("authorization")
        body = parse(raw)
        reader.hold(VALUE_BYTES * body.num_values)
        info = read_run(request.headers, body.members)
        info = admitted(caller, info, request.headers, body.members, body.model)
        unusual = [] if request.headers.is_usual else request.headers.names()
        self._spelling.look(unusual, body.members)
        if self.log_prompts:
            _prompts.info("%s %s: %s", request_id, info.tenant_id, body.raw.decode())
        if self._binder.is_gone(body.model):
            fleet = self._dispatcher.fleet
            served = sorted(
                {
                    model
                    for instance in fleet
                    for model in instance.models
                    if caller is None or caller.may_ask_for(model)
                }
            )
            raise RequestError(
                f"model: {body.model!a:.256} is not served here; served are {served}",
                status=404,
                param="model",
                code="model_not_found",
            )
        return Call(
            request.path,
            headers,
            body,
            info,
            request_id=request_id,
            key=f"{request_id}#{next(self._ids)}",
            arrival_time=now,
            takes_xargs=takes_xargs,
        )

    async def _once(self, request: Exchange, call: Call, known: tuple[Key, bool]) -> Answer:
        """Relay a call that would be known again, unless it runs already."""
        key, again = known
        body = call.path.encode() + b"\n" + call.body.raw
        if not call.body.stream:
            start = partial(self._in_run, call=call)
            return await self.running.answer(key, body, request, start, again=again)
        if not self.running.begin_stream(key, body, again=again):
            return await self._in_run(request, call)
        try:
            return await self._in_run(request, call)
        finally:
            self.running.end_stream(key)

    async def _in_run(self, reply: Reply, call: Call) -> Answer:
        """Relay the call as part of its run.

        Args:
            reply: To answer as bytes come, where the answer is not returned whole.
            call: What was read of it.
        """
        info, body = call.info, call.body
        run = self.runs.begin(info, call.arrival_time)
        ok = False
        try:
            workflow = info.workflow or run.workflow
            predicted = self._dispatcher.predict(
                call.begin(workflow, run.deadline, run.arrival_time),
                num_prompt_bytes=len(body.raw),
                max_tokens=body.max_tokens if call.takes_xargs else 1,
                head=head_of(body.members) if call.takes_xargs else (),
            )
            run.deadline = predicted.deadline  # its own, or what its tenant is promised
            if info.attained_ms and not predicted.attained_s:
                told_s = info.attained_ms / 1000.0
                predicted = predicted._replace(attained_s=told_s, attained_path_s=told_s)
            if info.expected_output_tokens is not None:
                most = body.max_tokens or math.inf
                predicted = predicted._replace(
                    expected_output_tokens=min(info.expected_output_tokens, most)
                )
            call.request = predicted
            if self._tracing is None:
                response, ok = await self._relay(reply, call)
                return response
            with self._tracing.call(call, run) as span:
                response, ok = await self._relay(reply, call)
                span.answered(response, ok=ok)
            return response
        finally:
            self.runs.end(info, run, time.monotonic(), ok=ok)
            if not ok and self._board is not None:
                self._board.gave_up(info.tenant_id, call.key, alone=not info.workflow_id)

    def _run_ended(self, run: Run) -> None:
        self._metrics.run_ended(run)
        if self._tracing is not None:
            self._tracing.run_ended(run)

    async def _relay(self, reply: Reply, call: Call) -> tuple[Answer, bool]:
        """Ask instances until one answers; then stay with it. Returns whether it ended well."""
        tries = Tries(
            partial(self._give_up_time, call), self.max_wait_s, self._upstreams.generation
        )
        while tries.may_go_on and not self._is_stopping:
            num_prompt_bytes = len(call.body.raw)
            try:
                decision, waits = self._binder.submit(
                    call.request, num_prompt_bytes=num_prompt_bytes, tries=tries
                )
                if decision is None:
                    decision = await self._binder.bind(
                        call.request, num_prompt_bytes=num_prompt_bytes, tries=tries, waits=waits
                    )
            except NoInstanceError:
                break
            except OverloadedError as e:
                self._metrics.run_refused(call.request.workflow)
                return _refusal(call, e), False
            except QuotaExceededError as e:
                if self._metrics.tenants is not None:
                    self._metrics.tenants.refused(call.request.tenant_id)
                raise quota_error(e) from None
            attempt = self._begun(call, decision)
            upstream = self._upstreams[attempt.instance_id]
            try:
                answer = await self._forwarder.forward(
                    reply, call, attempt, fresh=tries.fresh_connection
                )
                if not isinstance(answer, Refusal):
                    if attempt.ok:
                        upstream.has_answered()
                    return answer, attempt.ok
                is_risky = answer.status in BROKEN and not upstream.has_failed()
                tries.refused(answer, time.monotonic(), is_risky=is_risky)
                self._metrics.failed_over(attempt.instance_id, str(answer.status))
            except LostError as e:
                tries.lost(attempt.instance_id, e.reason, time.monotonic())
                self._metrics.failed_over(attempt.instance_id, e.reason)
            finally:  # the reservation lasts exactly as long as this, however it ends
                self._settle(call, attempt)
        return self._give_up(call, tries), False

    def _give_up_time(self, call: Call) -> float | None:
        """Instant at which the deadline allows no more waiting; None without a deadline."""
        request = call.request
        if not request.has_deadline:
            return None
        service_s = self._dispatcher.fleet.mean_service_s(
            request.model, request.num_prompt_tokens, request.expected_output_tokens
        )
        return max(request.deadline - service_s, request.arrival_time + MIN_WAIT_S)

    def _begun(self, call: Call, decision: Decision) -> Attempt:
        """Return the attempt for which a decision has been reserved; `_settle` must follow."""
        now = time.monotonic()
        stream = call.body.stream
        attempt = Attempt(decision, call.request, now, Usage(stream=stream), stream)
        self._metrics.dispatched(decision, now - call.request.arrival_time)
        if self._kv_events is not None:
            self._kv_events.sent(attempt.instance_id, call.request)
        return attempt

    def _settle(self, call: Call, attempt: Attempt) -> None:
        """Let go of a reservation, and learn from how the attempt ended."""
        outcome = attempt.outcome(time.monotonic())
        self._binder.settle(outcome)
        self._metrics.settled(attempt.decision, outcome)
        if self._kv_events is not None:
            self._kv_events.ended(outcome)
        if self._metrics.tenants is not None:
            self._metrics.tenants.used(call.request.tenant_id, outcome)

    def _give_up(self, call: Call, tries: Tries) -> Answer:
        """Answer for a fleet of which no instance could: with its own last word, if any."""
        model = call.body.model
        if self._is_stopping:
            return error_answer(
                503,
                "the router is being stopped; another one may answer",
                code="shutting_down",
                headers={"X-Request-Id": call.request_id, "Retry-After": str(RETRY_AFTER_S)},
            )
        if tries.refusal is None and self._binder.is_gone(model):
            return error_answer(
                404,
                f"model: {model!a:.256} is not served here any more",
                param="model",
                code="model_not_found",
                headers={"X-Request-Id": call.request_id},
            )
        if tries.refusal is None:
            reason = "; ".join(tries.reasons) or "none is healthy"
            return error_answer(
                503,
                f"no instance can serve model {model!a:.256} now ({reason})",
                code="no_instance",
                headers={"X-Request-Id": call.request_id, "Retry-After": str(RETRY_AFTER_S)},
            )
        refusal = tries.refusal
        headers = refusal.headers
        headers.remove("connection")
        headers.set("X-Request-Id", call.request_id)
        headers.set("X-Workflow-Instance", refusal.instance_id)
        if refusal.status in BUSY and "retry-after" not in headers:
            headers.set("Retry-After", str(RETRY_AFTER_S))
        return Answer(refusal.status, headers, refusal.body)


def _log_call(
    call: Call | None, headers: Headers, instance_id: str, status: int, begin: float
) -> None:
    """Log one call by what names it; `call` is None if it could not be read."""
    fields: dict[str, object] = {
        "status": status,
        "seconds": round(time.monotonic() - begin, 4),
        "instance": instance_id,
    }
    if call is None:
        fields |= labels_of(headers)
    else:
        info = call.info
        fields |= {
            "request": call.request_id,
            "run": info.workflow_id,
            "workflow": info.workflow,
            "stage": info.stage,
            "tenant": info.tenant_id,
            "model": call.body.model,
        }
    text = " ".join(f"{name}={value!r}" for name, value in fields.items())
    calls.info("call %s", text, extra=fields)


def _refusal(call: Call, error: OverloadedError) -> Answer:
    """Answer for a run that is not to begin."""
    return error_answer(
        503,
        str(error),
        code="overloaded",
        headers={
            "X-Request-Id": call.request_id,
            "Retry-After": str(math.ceil(error.retry_after_s)),
            "X-Workflow-Refused": "overloaded",
        },
    )
