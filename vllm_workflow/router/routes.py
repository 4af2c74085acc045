"""What clients can ask of the router."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from functools import partial, wraps

from aiohttp import HttpVersion11, web

from vllm_workflow.router.auth import Access, KeyCheck, unauthorized, visible
from vllm_workflow.router.errors import RequestError, error_response
from vllm_workflow.router.exchange import Handle, by_aiohttp
from vllm_workflow.router.health import Health
from vllm_workflow.router.metrics import Metrics
from vllm_workflow.router.openapi import document
from vllm_workflow.router.proxy import Proxy
from vllm_workflow.router.upstreams import Upstreams

GENERATION_PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
EMBEDDING_PATHS = ("/v1/embeddings",)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Routes:
    """The clients' application.

    Args:
        proxy: Answers the calls themselves.
        upstreams: Who is asked.
        metrics: Shown on /metrics.
        access: Whose keys open what.
        operator: The operators' key, which opens /metrics too; None if there is none.
        more: Adds further routes.
    """

    def __init__(
        self,
        proxy: Proxy,
        upstreams: Upstreams,
        metrics: Metrics,
        access: Access,
        operator: KeyCheck | None,
        more: Callable[[web.Application], None] = lambda app: None,
    ) -> None:
        self._proxy = proxy
        self._upstreams = upstreams
        self._metrics = metrics
        self._access = access
        self._operator = operator
        self._more = more
        self.health = Health(proxy, upstreams, access, operator)
        """What probes are told."""

    def calls(self) -> Mapping[str, Handle]:
        """Return what is relayed to instances, by path."""
        generating = partial(self._proxy.handle, takes_xargs=True)
        embedding = partial(self._proxy.handle, takes_xargs=False)
        return dict.fromkeys(GENERATION_PATHS, generating) | dict.fromkeys(
            EMBEDDING_PATHS, embedding
        )

    def build(self) -> web.Application:
        app = web.Application(logger=logging.getLogger(__name__))
        for path, handle in self.calls().items():
            app.router.add_post(path, by_aiohttp(handle), expect_handler=expect)
        app.router.add_get("/v1/models", answering(self._models), expect_handler=expect)
        for path, probe in (
            ("/health", self.health.health),
            ("/live", self.health.live),
            ("/ready", self.health.ready),
        ):
            app.router.add_get(path, answering(probe), expect_handler=expect)
        app.router.add_get("/metrics", answering(self._show_metrics), expect_handler=expect)
        app.router.add_get("/openapi.json", answering(self._openapi), expect_handler=expect)
        self._more(app)
        add_fallback(app)
        return app

    async def _models(self, request: web.Request) -> web.Response:
        caller = self._access.caller(request.headers.get("Authorization", ""))
        cards = {
            card["id"]: card
            for upstream in self._upstreams
            if self._upstreams.is_healthy(upstream)
            for card in upstream.model_cards()
        }
        return web.json_response({"object": "list", "data": visible(caller, cards.values())})

    async def _show_metrics(self, request: web.Request) -> web.Response:
        check_operator(request, self._access, self._operator)
        return metrics_response(self._metrics)

    async def _openapi(self, request: web.Request) -> web.Response:
        return web.json_response(document())


def check_operator(request: web.Request, access: Access, operator: KeyCheck | None) -> None:
    """Let pass who may see what goes on in the router.

    Raises:
        RequestError: 401: calls need a key here, and this is not the operators'.
    """
    if access.metrics_need_key():
        if operator is None:
            raise unauthorized(
                "expected the operators' key (`admin` in router.yaml), and there is none"
            )
        operator.check(request.headers)


def metrics_response(metrics: Metrics) -> web.Response:
    return web.Response(
        body=metrics.exposition(),
        headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"},
    )


def answering(handler: Handler) -> Handler:
    """Turn a `RequestError` into the answer it stands for."""

    @wraps(handler)
    async def answer(request: web.Request) -> web.StreamResponse:
        try:
            return await handler(request)
        except RequestError as e:
            return e.response()

    return answer


async def expect(request: web.Request) -> web.StreamResponse | None:
    """Ask for the body if the client waits to be asked; None if it may go on.

    aiohttp's own repeats in its answer what the client expects, and fails where that is no text.
    """
    if request.headers["Expect"].lower() != "100-continue":
        return error_response(
            417, "header Expect: expected 100-continue, got something else", param="Expect"
        )
    if request.version == HttpVersion11:
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0  # the answer has not begun
    return None


def add_fallback(app: web.Application) -> None:
    """Answer what no route does: 405 for a known path, else 404. To be called last."""
    methods: dict[str, set[str]] = {}
    for route in app.router.routes():
        if route.resource is not None:
            methods.setdefault(route.resource.canonical, set()).add(route.method)

    async def fall_back(request: web.Request) -> web.StreamResponse:
        if allowed := methods.get(request.path):
            wanted = ", ".join(sorted(allowed))
            return error_response(
                405,
                f"method: expected {wanted} on this path, got {request.method!a:.32}",
                code="method_not_allowed",
                headers={"Allow": wanted},
            )
        return error_response(
            404, f"{request.method:.32} {request.path!a:.256} is not known here", code="not_found"
        )

    app.router.add_route("*", "/{path:.*}", fall_back, expect_handler=expect)
