"""Two routers in front of the same instances that know nothing of each other."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import pytest

from tests.fakes import FakeEngine
from tests.faults.conftest import until
from tests.faults.load import CHAT, Load
from tests.faults.processes import engines
from vllm_workflow.client import attach, stage, workflow
from vllm_workflow.router.app import Router, serve
from vllm_workflow.router.config import RouterConfig

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def two_routers(*urls: str, **config: Any) -> AsyncIterator[tuple[Router, Router]]:
    """Run two from one configuration, as replicas of one deployment are."""
    instances = [{"id": "abc"[i], "url": url} for i, url in enumerate(urls)]
    data = {"port": 0, "shutdown_grace_s": 0.5, "instances": instances, **config}
    checked = RouterConfig.from_mapping(data, source="test")
    async with asyncio.timeout(120), serve(checked) as one, serve(checked) as two:
        yield one, two


async def test_a_run_that_goes_from_one_to_the_other_keeps_its_deadline() -> None:
    async with FakeEngine().serving() as engine, aiohttp.ClientSession() as session:
        async with two_routers(engine.url) as (one, two):
            run = {"X-Workflow-Id": "run", "X-Workflow-Slo-Ms": "60000"}
            left_ms = 60_000
            for router in (one, two, one, two):
                left_ms -= 10_000
                headers = run | {"X-Workflow-Budget-Ms": str(left_ms)}
                async with session.post(router.url + CHAT, json={}, headers=headers) as answer:
                    assert answer.status == 200
                    assert float(answer.headers["X-Workflow-Slack-Ms"]) <= left_ms

    budgets = [received.xargs["wf_budget_ms"] for received in engine.received]
    for told, wanted in zip(budgets, (50_000, 40_000, 30_000, 20_000), strict=True):
        assert wanted - 5_000 < told <= wanted
    ages = [received.xargs["wf_age_ms"] for received in engine.received]
    for told, wanted in zip(ages, (10_000, 20_000, 30_000, 40_000), strict=True):
        assert wanted <= told < wanted + 5_000


async def test_a_run_that_one_has_begun_is_no_new_one_to_the_other() -> None:
    """What its first calls have had travels with the next, so that it is not made to wait with
    those that have not begun."""
    async with FakeEngine().serving() as engine:
        async with two_routers(engine.url) as (one, two), httpx.AsyncClient() as client:
            attach(client)
            with workflow("w", slo_s=60):
                for router, stage_name in ((one, "first"), (two, "second")):
                    with stage(stage_name):
                        answer = await client.post(router.url + CHAT, json={}, timeout=60)
                        assert answer.status_code == 200

    first, second = (received.xargs for received in engine.received)
    assert "wf_attained_ms" not in first
    assert second["wf_attained_ms"] > 0
    assert second["wf_age_ms"] > 0
    assert second["wf_id"] == first["wf_id"]


async def test_one_sees_the_calls_of_the_other_and_goes_where_there_are_none() -> None:
    async with (
        FakeEngine(held=True, tells_own_load=True).serving() as a,
        FakeEngine(tells_own_load=True).serving() as b,
        aiohttp.ClientSession() as session,
    ):
        async with two_routers(a.url, b.url) as (one, two):
            two.upstreams.drain("b")
            calls = [
                asyncio.ensure_future(session.post(two.url + CHAT, json={}).__aenter__())
                for _ in range(8)
            ]
            await a.wait_for(received=8)
            await until(lambda: one.upstreams["a"].others.num_calls == 8, 60.0)
            assert two.upstreams["a"].others.num_calls == 0
            for _ in range(4):
                async with session.post(one.url + CHAT, json={}) as answer:
                    assert answer.headers["X-Workflow-Instance"] == "b"
            a.release(8)
            for call in calls:
                (await call).close()


async def test_when_one_is_stopped_no_run_is_lost_to_clients_that_ask_the_other(
    tmp_path: Path,
) -> None:
    async with engines(tmp_path, 2) as found:
        async with two_routers(*(engine.url for engine in found)) as (one, two):
            stopping = RouterConfig.from_mapping(
                {
                    "port": 0,
                    "shutdown_grace_s": 0,
                    "instances": [{"id": "a", "url": found[0].url}],
                },
                source="test",
            )
            async with serve(stopping) as third:
                load = Load(url=third.url, num_calls=4, num_tokens=20)
                task = asyncio.create_task(load.runs(20))
                await until(lambda: third.dispatcher.num_in_flight > 0, 60.0)
                load.url = one.url  # as a load balancer does for whatever comes next
            load.url = two.url
            tally = await task

    assert tally.num_lost_runs == tally.num_truncated == tally.num_timeouts == 0
    assert tally.statuses.keys() <= {200, 503}
    assert Counter(tally.statuses)[200] >= 80
