"""A router in front of engine processes; when it ends, it holds nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.faults.processes import EngineProcess, engines
from vllm_workflow.router.app import Router, serve
from vllm_workflow.router.config import RouterConfig

LATENCY = {"overhead_ms": 2, "weights_ms": 8, "per_token_us": 20}


async def until(holds: Callable[[], bool], timeout_s: float = 10.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not holds():
            await asyncio.sleep(0.002)


def is_healthy(router: Router, instance_id: str) -> bool:
    return router.dispatcher.fleet.is_healthy(instance_id)


def holds_nothing(router: Router) -> bool:
    dispatcher, proxy = router.dispatcher, router.proxy
    return (
        dispatcher.num_in_flight == 0
        and dispatcher.fleet.num_outstanding() == 0
        and all(dispatcher.fleet.outstanding_s(i.instance_id) == 0.0 for i in dispatcher.fleet)
        and len(dispatcher.waiting) == 0
        and proxy._binder.num_stranded == 0
        and not proxy._binder._waiting
        and len(proxy.running) == 0
        and not any(upstream.silence.attempts for upstream in router.upstreams)
        and not any(run.num_open for run in proxy.runs._runs.values())
    )


@asynccontextmanager
async def routed(found: list[EngineProcess], **config: Any) -> AsyncIterator[Router]:
    """Run a router in front of engines, which it calls `a`, `b`, …"""
    seats = config.pop("seats", 256)
    instances = [
        {"id": "abcdefgh"[i], "url": e.url, "max_num_seqs": seats, "latency": LATENCY}
        for i, e in enumerate(found)
    ]
    data = {"port": 0, "shutdown_grace_s": 0.5, "instances": instances, **config}
    async with serve(RouterConfig.from_mapping(data, source="test")) as router:
        yield router
        await until(lambda: holds_nothing(router))


Routed = Callable[..., AbstractAsyncContextManager[tuple[Router, list[EngineProcess]]]]


@pytest.fixture
def fleet(tmp_path: Path) -> Routed:
    """Start engines and a router in front of them."""

    @asynccontextmanager
    async def start(
        num_engines: int = 2, *, router: dict[str, Any] | None = None, **behaviour: Any
    ) -> AsyncIterator[tuple[Router, list[EngineProcess]]]:
        async with (
            asyncio.timeout(60),
            engines(tmp_path, num_engines, **behaviour) as found,
            routed(found, **(router or {})) as running,
        ):
            yield running, found

    return start


async def wait(*waits: Awaitable[object]) -> None:
    await asyncio.gather(*waits)
