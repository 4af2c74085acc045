"""One call on its way through the router: what came in, and what goes out."""

from __future__ import annotations

import itertools
import random

from vllm_workflow.core.handover import handover
from vllm_workflow.core.ordering import OrderingPolicy
from vllm_workflow.core.types import Decision, StageRequest
from vllm_workflow.router.body import Body, with_additions
from vllm_workflow.router.errors import RequestError
from vllm_workflow.router.headers import Headers
from vllm_workflow.router.wire import RunInfo, is_label

# Ids of two routers differ, and those of two calls of one.
_PROCESS = f"{random.getrandbits(96):024x}"
_numbers = itertools.count(1)
_MAX_INT64 = (1 << 63) - 1


class Call:
    """A client's request, read."""

    __slots__ = (
        "arrival_time",
        "body",
        "headers",
        "info",
        "key",
        "path",
        "request",
        "request_id",
        "takes_xargs",
    )

    def __init__(
        self,
        path: str,
        headers: Headers,
        body: Body,
        info: RunInfo,
        *,
        request_id: str,
        key: str,
        arrival_time: float,
        takes_xargs: bool,
    ) -> None:
        self.path = path
        """Path and query to forward to."""
        self.headers = headers
        """Headers to forward."""
        self.body = body
        self.info = info
        self.request_id = request_id
        """`X-Request-Id`; two clients may use the same one."""
        self.takes_xargs = takes_xargs
        """Whether the endpoint knows `vllm_xargs` and `priority`."""
        self.key = key
        """Of this call alone."""
        self.arrival_time = arrival_time

    def begin(self, workflow: str, deadline: float, run_arrival_time: float) -> StageRequest:
        """Make `request`, what the dispatcher is told of it: now that its run is known."""
        info = self.info
        self.request = StageRequest(
            self.key,
            self.arrival_time,
            info.workflow_id,
            workflow,
            info.stage,
            info.tenant_id,
            self.body.model,
            info.priority or 0,
            deadline,
            run_arrival_time,
            final=info.final,
        )
        return self.request


def request_headers(headers: Headers) -> tuple[Headers, str]:
    """Return the headers to forward, and the request id in them.

    Raises:
        RequestError: A value that is not text; it could not be sent on unchanged.
    """
    forwarded = headers.copy()
    if not headers.is_usual:
        forwarded.remove("content-encoding")  # the body is decoded here
        for name, value in forwarded.items():
            if not value.isascii():
                _check_text(name, value)
    request_id = headers.get("x-request-id")
    if not is_label(request_id):
        request_id = f"{_PROCESS}{next(_numbers)}"
        forwarded.set("X-Request-Id", request_id)
    return forwarded, request_id


def _check_text(name: str, value: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RequestError(f"header {name}: expected UTF-8, got other bytes", param=name) from None


def forwarded_body(
    call: Call,
    decision: Decision,
    ordering: OrderingPolicy | None,
    *,
    now: float,
    unix_time: float,
    has_session: bool = False,
) -> bytes:
    """Return the body for one attempt, with the budget that is left at `now`.

    Args:
        call: The call.
        decision: Where it goes now.
        ordering: Gives the `priority` to add; None to add none, except one from a hint.
        now: Instant on the clock of `call.request`.
        unix_time: The same instant as seconds since 1970.
        has_session: Name the call in the engine's KV events, unless its body has a name for it.
    """
    if not call.takes_xargs:
        return call.body.raw
    info, request = call.info, call.request
    xargs: dict[str, str | int] = {}
    if info.names_run or request.has_deadline:
        xargs = _xargs(info, request, decision, now)
    priority = info.priority
    if "x-vllm-priority" in call.headers:
        priority = None
    elif ordering is not None:
        placed = request._replace(service_s=decision.chosen.service_s)
        key = ordering.key(placed)
        if ordering.key_is_instant:
            key += unix_time - now
        priority = priority_of(key, info.priority or 0)
    session_id = request.request_id if has_session and not _names_session(call.body) else None
    return with_additions(call.body, xargs, priority=priority, session_id=session_id)


def _names_session(body: Body) -> bool:
    """Whether the body says what vLLM takes for `session_id`; a header counts less there."""
    theirs = body.members.get("vllm_xargs")
    return "session_id" in body.members or (isinstance(theirs, dict) and "session_id" in theirs)


def priority_of(key: float, level: int = 0) -> int:
    """Return the `priority` of a call for a stock server, in milliseconds.

    Args:
        key: From the ordering policy; an instant in seconds since 1970, so that calls on one
            instance compare whichever router sent them and whenever it was started.
        level: From a client's hint; goes before the key: 10^13 ms each, within the 64 bits
            of the field.
    """
    priority = round(1000.0 * key) + level * 10**13
    return max(-_MAX_INT64, min(priority, _MAX_INT64))


def _xargs(
    info: RunInfo, request: StageRequest, decision: Decision, now: float
) -> dict[str, str | int]:
    xargs: dict[str, str | int] = {}
    if info.workflow_id:
        xargs["wf_id"] = info.workflow_id
    if request.workflow:
        xargs["wf_name"] = request.workflow
    if info.stage:
        xargs["wf_stage"] = info.stage
    if info.tenant_id:
        xargs["wf_tenant"] = info.tenant_id
    xargs.update(handover(request, service_s=decision.chosen.service_s, now=now).xargs())
    if info.final:
        xargs["wf_final"] = 1
    return xargs
