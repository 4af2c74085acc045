"""The words of other routers and agents for what a run, a stage or a priority is.

Never an error: these fields are not ours, and their owners may change them.

| where | field | becomes |
|---|---|---|
| body `vllm_xargs.agentic_context` | `program_id`, `step_id` | run, stage |
| | `deadline_seconds` | budget |
| | `priority` | priority, lower first, as everywhere in a vLLM body |
| | `expected_output_length` | expected output tokens |
| body `nvext.agent_hints` | `priority` | priority, sign changed: there higher is more urgent |
| | `osl` | expected output tokens |
| header `X-Session-ID` | | run |
| header `baggage` (W3C) | `workflow.id`, `workflow.name`, `workflow.stage` | run, its kind, stage |
| header `x-claude-code-session-id`, `session-id` | | run |

The first in this order that names a run is taken; hints are taken from the first that has any.
`agentic_context.task_id` and `parent_id` name the tree of agents and are only passed on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

from vllm_workflow.router.headers import Headers
from vllm_workflow.router.wire import MAX_MS, RunInfo, is_label, read_own

_MAX_PRIORITY = 1 << 31
_SESSION_HEADERS = ("x-claude-code-session-id", "session-id")
_BAGGAGE: Mapping[str, str] = {
    "workflow.id": "workflow_id",
    "workflow.name": "workflow",
    "workflow.stage": "stage",
}


def read_run(headers: Headers, body: Mapping[str, Any]) -> RunInfo:
    """Return what a request says of its run, from the source that counts.

    Args:
        headers: Of the request.
        body: The JSON object of the request.

    Raises:
        RequestError: A malformed value in a source of our own.
    """
    found = read_own(headers, body)
    context = agentic_context(body)
    if len(found) == ("tenant_id" in found):
        found |= (
            _from_agentic_context(context)
            or _from_label("workflow_id", headers.get("x-session-id"))
            or _from_baggage(headers.get("baggage"))
            or _from_sessions(headers)
        )
    hints = _hints(context, 1, "expected_output_length") if context else {}
    if not hints and "nvext" in body:
        hints = _nvext(body)
    return RunInfo(
        found.get("workflow_id", ""),
        found.get("workflow", ""),
        found.get("stage", ""),
        found.get("tenant_id", ""),
        found.get("slo_ms"),
        found.get("budget_ms"),
        found.get("attained_ms"),
        found.get("final", False),
        hints.get("priority"),
        hints.get("expected_output_tokens"),
    )


def agentic_context(body: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return `vllm_xargs.agentic_context`, empty if it is not there or not an object."""
    xargs = body.get("vllm_xargs")
    context = xargs.get("agentic_context") if isinstance(xargs, dict) else None
    return context if isinstance(context, dict) else {}


def _from_agentic_context(context: Mapping[str, Any]) -> dict[str, Any]:
    found = _from_label("workflow_id", context.get("program_id"))
    found |= _from_label("stage", context.get("step_id"))
    budget_s = _number(context.get("deadline_seconds"))
    if budget_s is not None and 0.0 <= budget_s <= MAX_MS / 1000.0:
        found["budget_ms"] = 1000.0 * budget_s
    return found


def _nvext(body: Mapping[str, Any]) -> dict[str, Any]:
    nvext = body.get("nvext")
    hints = nvext.get("agent_hints") if isinstance(nvext, dict) else None
    return _hints(hints, -1, "osl") if isinstance(hints, dict) else {}


def _hints(hints: Mapping[str, Any], sign: int, length: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    priority = _number(hints.get("priority"))
    if priority is not None and abs(priority) <= _MAX_PRIORITY:
        found["priority"] = sign * round(priority)
    num_tokens = _number(hints.get(length))
    if num_tokens is not None and 1.0 <= num_tokens <= 1e7:
        found["expected_output_tokens"] = num_tokens
    return found


def _from_sessions(headers: Headers) -> dict[str, Any]:
    for name in _SESSION_HEADERS:
        if found := _from_label("workflow_id", headers.get(name)):
            return found
    return {}


def _from_baggage(header: str) -> dict[str, Any]:
    """Read `key=value;property,…` with percent-encoded values."""
    found: dict[str, Any] = {}
    for member in header.split(",") if header else ():
        key, _, value = member.partition(";")[0].partition("=")
        if name := _BAGGAGE.get(key.strip()):
            found |= _from_label(name, unquote(value.strip()))
    return found


def _from_label(name: str, value: object) -> dict[str, Any]:
    if type(value) is int and abs(value) < 1 << 63:
        value = str(value)
    return {name: value} if isinstance(value, str) and is_label(value) else {}


def _number(value: object) -> float | None:
    if type(value) not in {int, float}:
        return None
    try:
        number = float(value)  # type: ignore[arg-type]
    except OverflowError:
        return None
    return number if math.isfinite(number) else None
