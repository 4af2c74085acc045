"""The router's routes in OpenAPI's words.

Members that the router does not read are the engine's own: vLLM documents them, and they pass
unchanged. What the router reads is written here as it is checked.
"""

from __future__ import annotations

from typing import Any

from vllm_workflow.router.wire import MAX_LABEL_LENGTH, MAX_MS

_LABEL = {"type": "string", "pattern": f"^[ -~]{{1,{MAX_LABEL_LENGTH}}}$"}
_MILLISECONDS = {"type": "number", "minimum": 0, "maximum": MAX_MS}
_FLAG = {"type": "string", "enum": ["true", "false", "1", "0"]}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "integer", "null"]},
            },
        }
    },
}
_HEADERS: dict[str, tuple[dict[str, Any], str]] = {
    "X-Workflow-Id": (_LABEL, "The run that the call belongs to."),
    "X-Workflow-Name": (_LABEL, "What kind of run it is."),
    "X-Workflow-Stage": (_LABEL, "The step of the run."),
    "X-Workflow-Slo-Ms": (
        {**_MILLISECONDS, "exclusiveMinimum": 0},
        "The run's promise, from its first call on.",
    ),
    "X-Workflow-Budget-Ms": (_MILLISECONDS, "What is left of it now."),
    "X-Workflow-Attained-Ms": (_MILLISECONDS, "Service that the run's calls have had so far."),
    "X-Workflow-Final": (_FLAG, "Whether this is the run's last call."),
    "X-Tenant-Id": (_LABEL, "Whose call it is; with keys, one that the key acts for."),
}
_XARGS: dict[str, Any] = {
    "type": "object",
    "description": "Flat values for the engine; `wf_*` say the same as the headers.",
    "additionalProperties": True,
}
_BODY: dict[str, Any] = {
    "type": "object",
    "properties": {
        "model": {"type": ["string", "null"]},
        "stream": {"type": "boolean"},
        "max_tokens": {"type": ["integer", "null"]},
        "metadata": {"type": ["object", "null"], "additionalProperties": True},
        "vllm_xargs": _XARGS,
    },
    "additionalProperties": True,
}
_REFUSALS = {
    "400": "A body or field that cannot be read: what, where, got, wanted.",
    "401": "No key, or an unknown one.",
    "403": "A tenant or model that the key does not open.",
    "404": "A model that is not served.",
    "408": "The body did not come in time.",
    "413": "The body is larger than `max_body_mb`.",
    "429": "The instances, or the router's memory for bodies, are full.",
    "431": "Headers that are too long or too many.",
    "503": "No instance can serve the model now.",
}
CALLS = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "completion",
    "/v1/responses": "response",
    "/v1/embeddings": "embedding",
}


def document() -> dict[str, Any]:
    """Return the document of the clients' port."""
    paths: dict[str, Any] = {path: {"post": _call(name)} for path, name in CALLS.items()}
    paths["/v1/models"] = {"get": _models()}
    paths |= _probes()
    metrics = _read("metrics", "Series for Prometheus.", {}, {"401": _REFUSALS["401"]})
    metrics["responses"]["200"]["content"] = {"text/plain": {"schema": {"type": "string"}}}
    paths["/metrics"] = {"get": metrics}
    paths["/openapi.json"] = {"get": _read("openapi", "This document.", {"type": "object"}, {})}
    paths["/openapi.json"]["get"]["security"] = []
    paths["/dashboard"], paths["/dashboard/state"] = {"get": _dashboard()}, {"get": _state()}
    return {
        "openapi": "3.1.0",
        "info": {"title": "vllm-workflow router", "version": "1"},
        "paths": paths,
        "components": {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "security": [{"key": []}, {}],
    }


def _models() -> dict[str, Any]:
    return _read(
        "models",
        "The models that are served, and that the key may ask for.",
        {
            "type": "object",
            "required": ["object", "data"],
            "properties": {
                "object": {"const": "list"},
                "data": {"type": "array", "items": {"type": "object", "required": ["id"]}},
            },
        },
        {"401": _REFUSALS["401"]},
    )


def _probes() -> dict[str, Any]:
    """Paths that tell how the router is, to whoever asks."""
    health = {
        "type": "object",
        "properties": {
            "healthy": {"type": "boolean"},
            "version": {"type": "string"},
            "policy": {"type": "string", "description": "Its fingerprint."},
            "instances": {"type": "object", "additionalProperties": {"type": "boolean"}},
        },
    }
    paths = {"/health": {"get": _read("health", "Whether any instance is healthy.", health, {})}}
    paths["/health"]["get"]["responses"]["503"] = _json("None is.", health)
    live = {"type": "object", "required": ["live"]}
    paths["/live"] = {"get": _read("live", "That the process answers.", live, {})}
    ready = {"type": "object", "required": ["ready"]}
    paths["/ready"] = {"get": _read("ready", "Whether calls are to come here.", ready, {})}
    paths["/ready"]["get"]["responses"]["503"] = _json("They are not.", ready)
    for path in paths.values():
        path["get"]["security"] = []
    return paths


def _dashboard() -> dict[str, Any]:
    page = _read("dashboard", "The live page, for people.", {}, {})
    page["responses"]["200"]["content"] = {"text/html": {"schema": {"type": "string"}}}
    page["security"] = []
    return page


def _state() -> dict[str, Any]:
    state = _read(
        "dashboardState",
        "What the live page shows.",
        {"type": "object", "required": ["number", "runs", "waiting", "tenants", "instances"]},
        {"400": _REFUSALS["400"], "401": _REFUSALS["401"]},
    )
    state["parameters"] = [
        {
            "name": "since",
            "in": "query",
            "required": False,
            "schema": {"type": "integer", "minimum": 0, "maximum": 10**18 - 1},
            "description": "`number` of the answer before: only runs that have changed are told.",
        }
    ]
    return state


def _call(name: str) -> dict[str, Any]:
    answer = {"application/json": {"schema": {"type": "object"}}, "text/event-stream": {}}
    return {
        "operationId": name,
        "summary": f"A {name}, answered by the instance that the policy chooses.",
        "parameters": [
            {"name": n, "in": "header", "required": False, "schema": schema, "description": text}
            for n, (schema, text) in _HEADERS.items()
        ],
        "requestBody": {"required": True, "content": {"application/json": {"schema": _BODY}}},
        "responses": {
            "200": {"description": "As the instance gave it.", "content": answer},
            **_errors(_REFUSALS),
        },
    }


def _read(name: str, summary: str, schema: Any, refusals: dict[str, str]) -> dict[str, Any]:
    return {
        "operationId": name,
        "summary": summary,
        "responses": {"200": _json("It.", schema), **_errors(refusals)},
    }


def _errors(refusals: dict[str, str]) -> dict[str, Any]:
    return {status: _json(text, _ERROR) for status, text in refusals.items()}


def _json(description: str, schema: Any) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": schema}}}
