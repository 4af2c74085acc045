"""Tells the router, or a vLLM server, which run and stage each LLM call belongs to.

    client = attach(AsyncOpenAI(base_url=...))
    with workflow("text2sql", slo_s=30) as run:
        with stage("generate"):
            await client.chat.completions.create(...)

Context variables carry the run through `await`, `asyncio.gather` and task groups; a hook of
the HTTP client turns them into request headers when a request is sent, so that a retry
carries the budget that is really left then. Works with every client built on httpx or
httpx2, among them openai 2 and 3, and needs neither of them itself.
"""

from __future__ import annotations

import contextvars
import inspect
import math
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from vllm_workflow.core.errors import OverloadedError

_P = ParamSpec("_P")
_T = TypeVar("_T")

_MAX_LABEL_LENGTH = 256
_UNAVAILABLE = 503
_CALL_KEY = "vllm_workflow.call"


@dataclass(slots=True, kw_only=True, eq=False)
class Call:
    """One HTTP request of a run; an attempt that the SDK retries is a call of its own."""

    stage: str | None
    start_s: float
    """Seconds since the run began."""
    first_byte_s: float | None = None
    """When the response headers arrived; the same clock as `start_s`."""
    end_s: float | None = None
    """When the response was read or closed; None while it is open or if none came."""
    status: int | None = None
    """HTTP status; None if no response came (connection refused, timeout)."""
    instance: str | None = None
    """`X-Workflow-Instance`: the instance that served the call."""
    slack_ms: float | None = None
    """`X-Workflow-Slack-Ms`: the router's slack for the call when it was dispatched."""
    queue_ms: float | None = None
    """`X-Workflow-Queue-Ms`: time the call waited in the router."""
    refused_for_s: float | None = None
    """`Retry-After` of a router that would not let the run begin; None if it did not say that."""


@dataclass(slots=True, kw_only=True, eq=False)
class Run:
    """One execution of a workflow, as `workflow()` yields it."""

    workflow_id: str
    name: str
    slo_s: float | None
    tenant: str | None
    start_time: float = field(default_factory=time.monotonic)
    """When the run began; `time.monotonic()`."""
    calls: list[Call] = field(default_factory=list)
    """Every call sent so far, in the order of sending."""

    @property
    def elapsed_s(self) -> float:
        """Seconds since the run began."""
        return time.monotonic() - self.start_time

    @property
    def budget_s(self) -> float | None:
        """What is left of the SLO, never below zero; None without an SLO."""
        return None if self.slo_s is None else max(0.0, self.slo_s - self.elapsed_s)

    @property
    def attained_s(self) -> float:
        """What its calls that ended have taken, without their waiting in a router."""
        return sum(
            max(0.0, call.end_s - call.start_s - (call.queue_ms or 0.0) / 1000.0)
            for call in self.calls
            if call.end_s is not None and call.status == 200
        )

    @property
    def refusal(self) -> OverloadedError | None:
        """What the router said when it would not let the run begin; None once a call was served."""
        answered = [call for call in self.calls if call.status is not None]
        if any(call.status < 400 for call in answered if call.status is not None):
            return None
        # Calls side by side are cancelled with the first that is refused, and have no answer.
        if not answered or (retry_after_s := answered[-1].refused_for_s) is None:
            return None
        return OverloadedError(
            f"run {self.workflow_id!r} was refused at its first call: it would begin too late "
            f"beside the runs that wait already; come again in {retry_after_s:.0f} s",
            retry_after_s=retry_after_s,
        )


@dataclass(slots=True, kw_only=True, eq=False)
class StageBlock:
    """One `with stage(...)` block."""

    name: str
    final: bool
    calls: list[Call] = field(default_factory=list)
    """The calls sent inside the block, a subset of the run's."""


_run: ContextVar[Run | None] = ContextVar("vllm_workflow_run", default=None)
_stage: ContextVar[StageBlock | None] = ContextVar("vllm_workflow_stage", default=None)


@contextmanager
def workflow(
    name: str, *, slo_s: float | None = None, id: str | None = None, tenant: str | None = None
) -> Iterator[Run]:
    """Make every call inside the block part of one run.

    Tasks of asyncio that are started inside belong to it. Threads of a pool do not, unless what
    they run is wrapped: `pool.submit(copy_context(ask), question)`.

    Args:
        name: The kind of workflow, the same for all its runs: the router learns by it.
        slo_s: The promise, in seconds from here until the run ends; None for no deadline.
        id: Identifies the run; a random one by default. Processes that work on the same
            run give the same id.
        tenant: Who the run is billed to and isolated from.

    Raises:
        ValueError: A name that cannot travel in an HTTP header, or an SLO that is not a
            positive number.
        OverloadedError: The router refused the run (`admission: reject`), and the error by which
            the client's library says so left the block.
    """
    is_number = isinstance(slo_s, int | float) and math.isfinite(slo_s)
    if slo_s is not None and not (is_number and slo_s > 0):
        raise ValueError(f"workflow(slo_s=...): wanted a positive number of seconds, got {slo_s!r}")
    run = Run(
        workflow_id=_checked("workflow(id=...)", uuid.uuid4().hex if id is None else id),
        name=_checked("workflow(name=...)", name),
        slo_s=slo_s,
        tenant=None if tenant is None else _checked("workflow(tenant=...)", tenant),
    )
    run_token, stage_token = _run.set(run), _stage.set(None)
    try:
        yield run
    except Exception as error:
        if (refusal := run.refusal) is not None and _is_unavailable(error):
            raise refusal from error
        raise
    finally:
        _stage.reset(stage_token)
        _run.reset(run_token)


@contextmanager
def stage(name: str, *, final: bool = False) -> Iterator[StageBlock]:
    """Name the stage of every call inside the block; the innermost block counts.

    In threads of a pool, only of what `copy_context` wraps inside the block.

    Args:
        name: The same for the same step of every run: the router learns lengths by it.
        final: The call inside is the run's last one, so the router can forget the run.

    Raises:
        ValueError: A name that cannot travel in an HTTP header.
    """
    block = StageBlock(name=_checked("stage(name)", name), final=final)
    token = _stage.set(block)
    try:
        yield block
    finally:
        _stage.reset(token)


def headers() -> dict[str, str]:
    """Return the headers of the current context, for clients that cannot be attached.

    The budget is that of the moment: ask again for each request.
    """
    result: dict[str, str] = {}
    run, block = _run.get(), _stage.get()
    if run is not None:
        result["X-Workflow-Id"] = run.workflow_id
        result["X-Session-ID"] = run.workflow_id
        result["X-Workflow-Name"] = run.name
        if run.slo_s is not None and (budget_s := run.budget_s) is not None:
            result["X-Workflow-Slo-Ms"] = str(max(1, round(run.slo_s * 1000)))
            result["X-Workflow-Budget-Ms"] = str(int(budget_s * 1000))
        if attained_ms := int(run.attained_s * 1000):
            result["X-Workflow-Attained-Ms"] = str(attained_ms)
        if run.tenant is not None:
            result["X-Tenant-Id"] = run.tenant
    if block is not None:
        result["X-Workflow-Stage"] = block.name
        if block.final:
            result["X-Workflow-Final"] = "true"
    return result


def attach(client: _T) -> _T:
    """Make `client` send the headers of the current run and stage; return it.

    Takes an OpenAI client, synchronous or not, or a bare httpx or httpx2 client. Attaching
    twice changes nothing. Headers that a call sets itself (`extra_headers`) win. What an OpenAI
    client tries again carries the same `Idempotency-Key`, by which the router knows a call that
    it is still running.

    Raises:
        TypeError: There is no HTTP client with event hooks in `client`.
    """
    if getattr(client, "_idempotency_header", "") is None:
        # OpenAI's SDKs make a key per call and keep it when they try again, but name no header.
        client._idempotency_header = "Idempotency-Key"  # type: ignore[attr-defined]
    http_client: Any = getattr(client, "_client", client)
    hooks = getattr(http_client, "event_hooks", None)
    if not isinstance(hooks, dict):
        raise TypeError(
            f"attach(): wanted an OpenAI or httpx client, got {type(client).__qualname__}"
        )
    if inspect.iscoroutinefunction(getattr(http_client, "send", None)):
        ours: dict[str, Callable[..., Any]] = {"request": _on_request_async}
        ours["response"] = _on_response_async
    else:
        ours = {"request": _on_request, "response": _on_response}
    for event, hook in ours.items():
        registered = hooks.setdefault(event, [])
        if hook not in registered:
            registered.append(hook)
    http_client.event_hooks = hooks
    return client


def copy_context(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Return `function` bound to the current run and stage, to be called from other threads.

    `pool.submit(copy_context(ask), question)`: threads of a pool do not inherit context
    variables. The result may be called by many threads at once.
    """
    context = contextvars.copy_context()

    @wraps(function)
    def bound(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        return context.copy().run(function, *args, **kwargs)

    return bound


def _is_unavailable(error: BaseException) -> bool:
    """Whether this is what HTTP libraries raise for a 503, or a group with one."""
    if isinstance(error, BaseExceptionGroup):
        return any(map(_is_unavailable, error.exceptions))
    status = getattr(error, "status_code", None)
    if status is None:
        status = getattr(getattr(error, "response", None), "status_code", None)
    return status == _UNAVAILABLE


def _checked(where: str, label: str) -> str:
    """Return `label` if it can be a header's value as it is."""
    if not isinstance(label, str) or not label or len(label) > _MAX_LABEL_LENGTH:
        raise ValueError(
            f"{where}: wanted a string of 1 to {_MAX_LABEL_LENGTH} characters, got {label!r:.80}"
        )
    if not (label.isascii() and label.isprintable()) or label != label.strip():
        raise ValueError(
            f"{where}: wanted printable ASCII without blanks at the ends, because it travels "
            f"in an HTTP header; got {label!r:.80}"
        )
    return label


def _on_request(request: Any) -> None:
    """Fill in what the request does not say itself, and note that it was sent."""
    for name, value in headers().items():
        if name not in request.headers:
            request.headers[name] = value
    run, block = _run.get(), _stage.get()
    if run is None:
        return
    call = Call(stage=request.headers.get("X-Workflow-Stage"), start_s=run.elapsed_s)
    run.calls.append(call)
    if block is not None:
        block.calls.append(call)
    request.extensions[_CALL_KEY] = (run, call)


def _note_response(response: Any) -> tuple[Run, Call] | None:
    noted: tuple[Run, Call] | None = response.request.extensions.get(_CALL_KEY)
    if noted is not None:
        run, call = noted
        call.first_byte_s = run.elapsed_s
        call.status = response.status_code
        call.instance = response.headers.get("X-Workflow-Instance")
        call.slack_ms = _number(response.headers.get("X-Workflow-Slack-Ms"))
        call.queue_ms = _number(response.headers.get("X-Workflow-Queue-Ms"))
        if "X-Workflow-Refused" in response.headers:
            call.refused_for_s = _number(response.headers.get("Retry-After")) or 0.0
    return noted


def _on_response(response: Any) -> None:
    """Note what the response headers say, and the end when the response is closed."""
    noted = _note_response(response)
    if noted is None:
        return
    run, call = noted
    close = response.close

    def close_and_note() -> None:
        close()
        call.end_s = run.elapsed_s if call.end_s is None else call.end_s

    response.close = close_and_note


async def _on_request_async(request: Any) -> None:
    _on_request(request)


async def _on_response_async(response: Any) -> None:
    noted = _note_response(response)
    if noted is None:
        return
    run, call = noted
    close = response.aclose

    async def close_and_note() -> None:
        await close()
        call.end_s = run.elapsed_s if call.end_s is None else call.end_s

    response.aclose = close_and_note


def _number(text: str | None) -> float | None:
    """Return the finite number in a header, None if there is none."""
    try:
        number = float(text) if text is not None else math.nan
    except ValueError:
        return None
    return number if math.isfinite(number) else None
