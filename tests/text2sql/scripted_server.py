"""A real OpenAI-shaped server on a local socket whose answers the test writes."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from tests.fakes import listening


@dataclass
class Request:
    """One request as the server received it."""

    headers: Mapping[str, str]
    body: dict[str, Any]
    number: int
    """Counted per stage, from 0, in the order of arrival."""

    @property
    def stage(self) -> str | None:
        return self.headers.get("X-Workflow-Stage")

    @property
    def prompt(self) -> str:
        return "\n".join(message["content"] for message in self.body["messages"])


Answer = str | int | web.StreamResponse
"""Text of a completion, an HTTP status, or a whole response."""


@dataclass
class Server:
    base_url: str
    requests: list[Request] = field(default_factory=list)

    def of(self, stage: str) -> list[Request]:
        return [request for request in self.requests if request.stage == stage]


@asynccontextmanager
async def serving(
    answer: Callable[[Request], Answer | Awaitable[Answer]] = lambda request: "ok",
    *,
    response_headers: Mapping[str, str] | None = None,
) -> AsyncIterator[Server]:
    server = Server(base_url="")

    async def chat(request: web.Request) -> web.StreamResponse:
        stage = request.headers.get("X-Workflow-Stage")
        number = sum(1 for earlier in server.requests if earlier.stage == stage)
        seen = Request(request.headers, await request.json(), number)
        server.requests.append(seen)
        answered = answer(seen)
        given = await answered if inspect.isawaitable(answered) else answered
        if isinstance(given, int):
            error = {"error": {"message": f"scripted {given}"}}
            given = web.json_response(error, status=given, headers={"retry-after-ms": "5"})
        if isinstance(given, str):
            given = web.json_response(completion(given), headers=response_headers)
        return given

    async def models(request: web.Request) -> web.StreamResponse:
        entry = {"id": "scripted", "object": "model", "created": 0, "owned_by": "test"}
        return web.json_response({"object": "list", "data": [entry]})

    app = web.Application()
    app.router.add_post("/v1/chat/completions", chat)
    app.router.add_get("/v1/models", models)
    async with listening(app) as url:
        server.base_url = f"{url}/v1"
        yield server


def completion(text: str) -> dict[str, Any]:
    message = {"role": "assistant", "content": text}
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 0,
        "model": "scripted",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10},
    }
