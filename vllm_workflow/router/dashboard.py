"""The live page: what it is made of, and what it asks for every second."""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Callable
from functools import cache
from importlib.resources import files
from typing import Any

from aiohttp import web

from vllm_workflow.core.dispatcher import Dispatcher
from vllm_workflow.core.policy_names import name_of
from vllm_workflow.router.board import Board
from vllm_workflow.router.errors import RequestError
from vllm_workflow.router.health import package_version
from vllm_workflow.router.routes import answering, expect
from vllm_workflow.router.upstream import Upstream
from vllm_workflow.router.upstreams import Upstreams

Check = Callable[[web.Request], None]
"""Raises `RequestError` where a key is wanted and not given."""


class Dashboard:
    """Answers for the page.

    Args:
        board: Runs and calls.
        dispatcher: Policy and ledger.
        upstreams: Instances.
        check: Of whoever asks for data; the page itself holds none.
        tuning: What the tuner last found, in one line; empty while there is nothing to say.
    """

    def __init__(
        self,
        board: Board,
        dispatcher: Dispatcher,
        upstreams: Upstreams,
        check: Check,
        tuning: Callable[[], str] = lambda: "",
    ) -> None:
        self._board = board
        self._dispatcher = dispatcher
        self._upstreams = upstreams
        self._check = check
        self._tuning = tuning

    def add_to(self, app: web.Application) -> None:
        """Add the page's routes; before the fallback."""
        app.router.add_get("/dashboard", self._page, expect_handler=expect)
        app.router.add_get("/dashboard/state", answering(self._state), expect_handler=expect)

    async def _page(self, request: web.Request) -> web.Response:
        nonce = secrets.token_urlsafe(16)
        policy = (
            f"default-src 'none'; script-src 'nonce-{nonce}'; connect-src 'self'; "
            f"style-src 'nonce-{nonce}'; frame-ancestors 'none'; base-uri 'none'"
        )
        return web.Response(
            text=_template().replace("{{nonce}}", nonce),
            content_type="text/html",
            headers={
                "Content-Security-Policy": policy,
                "X-Content-Type-Options": "nosniff",
                "Referrer-Policy": "no-referrer",
                "Cache-Control": "no-store",
            },
        )

    async def _state(self, request: web.Request) -> web.Response:
        self._check(request)
        since = request.query.get("since", "0")
        if not (since.isascii() and since.isdigit() and len(since) <= 18):
            raise RequestError(
                f"since: expected an integer from 0, got {since!a:.80}", param="since"
            )
        return web.Response(
            text=self.state(int(since)),
            content_type="application/json",
            headers={"Cache-Control": "no-store"},
        )

    def state(self, since: int = 0) -> str:
        """Return what the page shows, as a JSON object; see `Board.snapshot`."""
        config = self._dispatcher.config
        shown = {
            "version": package_version(),
            "policy": {"name": name_of(config), "fingerprint": config.fingerprint},
            "num_in_flight": self._dispatcher.num_in_flight,
            "instances": [self._instance(upstream) for upstream in self._upstreams],
            "tuning": self._tuning(),
        }
        return f"{json.dumps(shown)[:-1]}, {self._board.snapshot(since)[1:]}"

    def _instance(self, upstream: Upstream) -> dict[str, Any]:
        instance_id, fleet = upstream.config.id, self._dispatcher.fleet
        healthy = self._upstreams.is_healthy(upstream)
        shown: dict[str, Any] = {
            "id": instance_id,
            "state": "healthy" if healthy else "leaving" if upstream.leaving else "unhealthy",
            "num_in_flight": fleet.num_outstanding(instance_id),
            "outstanding_s": 0.0,
            "drift": None,
            "kv_used": None,
        }
        if instance_id in fleet:
            drift = fleet.drift(instance_id)
            shown["outstanding_s"] = round(fleet.outstanding_s(instance_id), 3)
            shown["drift"] = round(drift, 3) if math.isfinite(drift) else None
            kv_used = fleet.kv_used(instance_id)
            shown["kv_used"] = None if kv_used is None else round(kv_used, 3)
        return shown


@cache
def _template() -> str:
    page = files("vllm_workflow.router").joinpath("pages", "dashboard.html")
    return page.read_text(encoding="utf-8")
