"""A server that answers at once, or a plain proxy before some: what routers are measured with.

python benchmarks/http_backend.py serve PORT
python benchmarks/http_backend.py proxy PORT URL…
"""

import asyncio
import itertools
import json
import sys

import aiohttp
import uvloop
from aiohttp import web

_USAGE = {"prompt_tokens": 500, "completion_tokens": 16, "total_tokens": 516}
_ANSWER = json.dumps(
    {"id": "x", "object": "chat.completion", "created": 0, "model": "m"}
    | {"choices": [{"index": 0, "message": {"role": "assistant", "content": "word " * 16}}]}
    | {"usage": _USAGE}
).encode()


def _event(**fields: object) -> bytes:
    chunk = {"id": "x", "object": "chat.completion.chunk", "created": 0, "model": "m", **fields}
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


_DELTA = _event(choices=[{"index": 0, "delta": {"content": "word "}, "finish_reason": None}])
_LAST = _event(choices=[], usage=_USAGE)


async def _answer(request: web.Request) -> web.StreamResponse:
    body = json.loads(await request.read())
    if not body.get("stream"):
        return web.Response(body=_ANSWER, content_type="application/json")
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    for _ in range(body["max_tokens"]):
        if gap_s := float(request.headers.get("X-Gap-Ms", 0)) / 1e3:
            await asyncio.sleep(gap_s)
        await response.write(_DELTA)
    if body.get("stream_options", {}).get("include_usage"):
        await response.write(_LAST)
    await response.write(b"data: [DONE]\n\n")
    return response


async def _health(request: web.Request) -> web.Response:
    return web.Response()


async def _models(request: web.Request) -> web.Response:
    return web.json_response({"object": "list", "data": [{"id": "m", "object": "model"}]})


def _server() -> web.Application:
    app = web.Application(client_max_size=1 << 28)
    app.router.add_get("/health", _health)
    app.router.add_get("/metrics", _health)
    app.router.add_get("/v1/models", _models)
    app.router.add_post("/v1/chat/completions", _answer)
    return app


def _proxy(urls: list[str]) -> web.Application:
    """The least that a proxy of the same libraries does: in turn, bytes through, no more."""
    turns = itertools.cycle(urls)
    app = web.Application(client_max_size=1 << 28)

    async def session(app: web.Application):  # type: ignore[no-untyped-def]
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector, auto_decompress=False) as made:
            app["session"] = made
            yield

    async def forward(request: web.Request) -> web.StreamResponse:
        headers = {k: v for k, v in request.headers.items() if k not in {"Host", "Content-Length"}}
        url, body = next(turns) + request.path, await request.read()
        async with app["session"].request(request.method, url, data=body, headers=headers) as got:
            if got.headers.get("Transfer-Encoding") != "chunked":
                return web.Response(
                    body=await got.read(), status=got.status, content_type=got.content_type
                )
            response = web.StreamResponse(status=got.status)
            response.content_type = got.content_type
            await response.prepare(request)
            async for chunk in got.content.iter_any():
                await response.write(chunk)
            return response

    app.cleanup_ctx.append(session)
    app.router.add_route("*", "/{path:.*}", forward)
    return app


if __name__ == "__main__":
    kind, port, *urls = sys.argv[1:]
    uvloop.install()
    web.run_app(
        _server() if kind == "serve" else _proxy(urls),
        host="127.0.0.1",
        port=int(port),
        access_log=None,
        print=None,
    )
