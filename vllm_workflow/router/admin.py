"""The operators' application: what goes on, and what may change while calls run."""

from __future__ import annotations

import asyncio
import json
import logging
import math
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from vllm_workflow.core.dispatcher import Dispatcher
from vllm_workflow.core.errors import ConfigError
from vllm_workflow.core.policy_names import name_of
from vllm_workflow.router.auth import KeyCheck
from vllm_workflow.router.config_paths import INSTANCE_FILES, paths
from vllm_workflow.router.errors import RequestError
from vllm_workflow.router.health import package_version
from vllm_workflow.router.instance_config import InstanceConfig
from vllm_workflow.router.limits import Bodies
from vllm_workflow.router.metrics import Metrics
from vllm_workflow.router.reload import RestartNeededError
from vllm_workflow.router.routes import (
    Handler,
    add_fallback,
    answering,
    expect,
    metrics_response,
)
from vllm_workflow.router.upstream import POSTED, Upstream
from vllm_workflow.router.upstreams import Upstreams
from vllm_workflow.yaml_config import validated

MAX_BODY_BYTES = 1 << 20
Reload = Callable[[], Awaitable[list[str]]]


class Admin:
    """Answers operators. Every path wants their key, whatever address it is asked from.

    Args:
        key: The operators' key.
        dispatcher: Asked for what waits and runs.
        upstreams: Changed by adding and draining.
        bodies: Asked for the memory of calls under way.
        metrics: Shown on /metrics.
        reload: Reads the configuration again; returns the fields that changed.
    """

    def __init__(
        self,
        key: KeyCheck,
        dispatcher: Dispatcher,
        upstreams: Upstreams,
        bodies: Bodies,
        metrics: Metrics,
        reload: Reload,
    ) -> None:
        self._key = key
        self._dispatcher = dispatcher
        self._upstreams = upstreams
        self._bodies = bodies
        self._metrics = metrics
        self._reload = reload

    def build(self) -> web.Application:
        @web.middleware
        async def with_key(request: web.Request, handler: Handler) -> web.StreamResponse:
            try:
                self._key.check(request.headers)
            except RequestError as e:
                return e.response()
            return await handler(request)

        app = web.Application(
            client_max_size=MAX_BODY_BYTES,
            middlewares=[with_key],
            logger=logging.getLogger(__name__),
        )
        app.router.add_get("/admin/status", answering(self._status), expect_handler=expect)
        app.router.add_get("/admin/profiles", answering(self._profiles), expect_handler=expect)
        app.router.add_post("/admin/instances", answering(self._add), expect_handler=expect)
        app.router.add_delete(
            "/admin/instances/{id}", answering(self._remove), expect_handler=expect
        )
        app.router.add_post("/admin/reload", answering(self._do_reload), expect_handler=expect)
        app.router.add_get("/metrics", answering(self._show_metrics), expect_handler=expect)
        add_fallback(app)
        return app

    async def _status(self, request: web.Request) -> web.Response:
        dispatcher = self._dispatcher
        return web.json_response(
            {
                "version": package_version(),
                "policy": {
                    "name": name_of(dispatcher.config),
                    "dispatch": dispatcher.config.dispatch,
                    "ordering": dispatcher.config.ordering,
                    "fingerprint": dispatcher.config.fingerprint,
                },
                "num_in_flight": dispatcher.num_in_flight,
                "num_waiting": len(dispatcher.waiting),
                "num_body_bytes": self._bodies.num_bytes,
                "instances": [self._instance(upstream) for upstream in self._upstreams],
            }
        )

    async def _profiles(self, request: web.Request) -> web.Response:
        """Tell what was learned of the stages that were seen last."""
        return web.json_response({"stages": self._dispatcher.predictor.learned.summary()})

    def _instance(self, upstream: Upstream) -> dict[str, Any]:
        instance_id, fleet = upstream.config.id, self._dispatcher.fleet
        state = "leaving" if upstream.leaving else "unhealthy"
        status = {
            "id": instance_id,
            "url": upstream.url,
            "state": "healthy" if self._upstreams.is_healthy(upstream) else state,
            "models": [card["id"] for card in upstream.model_cards()],
            "num_in_flight": fleet.num_outstanding(instance_id),
        }
        if instance_id in fleet:
            drift = fleet.drift(instance_id)
            status["outstanding_s"] = round(fleet.outstanding_s(instance_id), 3)
            status["drift"] = round(drift, 3) if math.isfinite(drift) else None
        return status

    async def _add(self, request: web.Request) -> web.Response:
        """Take in the instance that the body describes in the words of `router.yaml`."""
        try:
            data = json.loads(await request.read())
        except web.HTTPRequestEntityTooLarge:
            raise RequestError(
                f"body: expected at most {MAX_BODY_BYTES} bytes, got more", status=413
            ) from None
        except (ValueError, RecursionError):
            raise RequestError("body: expected JSON, got something else") from None
        for field, path in paths(data, INSTANCE_FILES):
            if not path.is_absolute():
                raise RequestError(
                    f"body: {field}: expected an absolute path on the router's machine, "
                    f"got {str(path)!a:.128}",
                    param=field,
                )
        try:
            # Reads files, and so it is for a thread.
            config = await asyncio.to_thread(validated, InstanceConfig, data, source="body")
        except ConfigError as e:
            raise RequestError(str(e)) from None
        if config.id in self._upstreams and not self._upstreams[config.id].leaving:
            raise RequestError(f"id: {config.id!r} is there already", status=409, param="id")
        if (twin := self._upstreams.twin(config)) is not None:
            raise RequestError(
                f"url: {config.url} is there already as {twin!r}", status=409, param="url"
            )
        self._upstreams.add(config, source=POSTED)
        return web.json_response({"id": config.id}, status=201)

    async def _remove(self, request: web.Request) -> web.Response:
        """Send an instance no more calls; it is gone when those under way have ended."""
        instance_id = request.match_info["id"]
        if unknown := sorted(request.query.keys() - {"drain"}):
            raise RequestError(
                f"query: expected drain only, got {unknown[0]!a:.80}", param=unknown[0][:80]
            )
        drain = {"true": True, "false": False}.get(request.query.get("drain", "true"))
        if drain is None:
            raise RequestError(
                f"drain: expected true or false, got {request.query['drain']!a:.80}", param="drain"
            )
        if instance_id not in self._upstreams:
            known = sorted(u.config.id for u in self._upstreams)
            raise RequestError(
                f"id: expected one of {known}, got {instance_id!a:.128}", status=404, param="id"
            )
        num_in_flight = self._upstreams.num_in_flight(instance_id)
        if num_in_flight and not drain:
            raise RequestError(
                f"drain: {num_in_flight} calls are under way on {instance_id!r}; expected "
                "drain=true, which lets them end",
                status=409,
                param="drain",
            )
        self._upstreams.drain_for_good(instance_id)
        return web.json_response({"id": instance_id, "num_in_flight": num_in_flight}, status=202)

    async def _do_reload(self, request: web.Request) -> web.Response:
        """Read router.yaml again; 400 and nothing changed if it cannot be used, 409 if it could
        after a restart."""
        try:
            changed = await self._reload()
        except RestartNeededError as e:
            raise RequestError(
                str(e), status=409, param=e.fields[0], code="restart_needed"
            ) from None
        except ConfigError as e:
            raise RequestError(str(e), code="invalid_config") from None
        return web.json_response({"changed": changed})

    async def _show_metrics(self, request: web.Request) -> web.Response:
        return metrics_response(self._metrics)
