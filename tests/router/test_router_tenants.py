"""Tenants' quotas and metrics, as a client of the router meets them."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.fakes import FakeEngine
from tests.router.conftest import Client, Routing
from vllm_workflow.core.errors import ConfigError
from vllm_workflow.router.config import RouterConfig
from vllm_workflow.router.tenants import MAX_UNNAMED, OTHER

pytestmark = pytest.mark.anyio

T = {"X-Tenant-Id": "t"}


async def until_in_flight(client: Client, tenant: str, number: int) -> None:
    async with asyncio.timeout(5):
        while await client.metric("tenant_requests_in_flight", tenant=tenant) != number:
            await asyncio.sleep(0)


async def test_a_call_beyond_the_concurrency_quota_waits_its_turn(routing: Routing) -> None:
    section = {"named": {"t": {"max_concurrent_calls": 1}}}
    async with FakeEngine(held=True).serving() as engine, routing(engine, tenants=section) as c:
        first = asyncio.ensure_future(c.post(headers=T))
        await until_in_flight(c, "t", 1)
        second = asyncio.ensure_future(c.post(headers=T))
        other = asyncio.ensure_future(c.post(headers={"X-Tenant-Id": "o"}))
        await until_in_flight(c, "o", 1)

        await engine.wait_for(received=2)
        assert await c.metric("tenant_requests_waiting", tenant="t") == 1.0
        for _ in range(3):
            engine.release(1)
        assert [(await r).status for r in (first, other, second)] == [200, 200, 200]
        delays = await c.metric("tenant_quota_delay_seconds_count", tenant="t", quota="calls")
        assert delays == 1.0


async def test_a_call_beyond_the_token_quota_is_sent_when_there_are_tokens(
    routing: Routing,
) -> None:
    section = {"named": {"t": {"tokens_per_minute": 60_000, "burst_tokens": 120}}}
    async with FakeEngine().serving() as engine, routing(engine, tenants=section) as c:
        answers = [await c.post(headers=T, max_tokens=1) for _ in range(3)]

        assert [answer.status for answer in answers] == [200, 200, 200]
        assert (await c.metric("tenant_tokens_total", tenant="t", kind="prompt")) == 300.0
        delays = await c.metric("tenant_quota_delay_seconds_count", tenant="t", quota="tokens")
        assert delays is not None
        assert delays >= 1.0


async def test_a_prompt_larger_than_the_quota_gets_a_429_that_says_not_to_come_again(
    routing: Routing,
) -> None:
    section = {"default": {"tokens_per_minute": 5}}
    async with FakeEngine().serving() as engine, routing(engine, tenants=section) as c:
        answer = await c.post(headers=T)
        error = (await answer.json())["error"]

        assert answer.status == 429
        assert answer.headers["x-should-retry"] == "false"
        assert error["code"] == "rate_limit_exceeded"
        assert error["message"].startswith("tenant 't': a prompt of about ")
        assert await c.metric("tenant_refusals_total", tenant="t") == 1.0


async def test_a_call_due_too_early_for_the_quota_gets_a_429_that_says_when_to_come_again(
    routing: Routing,
) -> None:
    section = {"default": {"tokens_per_minute": 120}}
    async with FakeEngine().serving() as engine, routing(engine, tenants=section) as c:
        await c.post(headers=T, max_tokens=1)
        answer = await c.post(headers=T | {"X-Workflow-Budget-Ms": "900"}, max_tokens=1)

        assert answer.status == 429
        assert 1 <= int(answer.headers["Retry-After"]) <= 60


async def test_runs_of_a_tenant_with_an_slo_class_are_held_to_it(routing: Routing) -> None:
    section = {"named": {"t": {"slo_s": 60}}}
    run = T | {"X-Workflow-Id": "w", "X-Workflow-Final": "true"}
    async with FakeEngine().serving() as engine, routing(engine, tenants=section) as c:
        answer = await c.post(headers=run)

        assert 0.0 < float(answer.headers["X-Workflow-Slack-Ms"]) <= 60_000.0
        assert 0 < engine.received[-1].xargs["wf_budget_ms"] <= 60_000
        assert await c.metric("tenant_runs_total", tenant="t", outcome="met") == 1.0


async def test_made_up_tenants_share_a_label_beyond_a_limit(routing: Routing) -> None:
    section: dict[str, Any] = {"named": {"last": {}}}
    async with FakeEngine().serving() as engine, routing(engine, tenants=section) as c:
        for number in range(MAX_UNNAMED + 2):
            await c.post(headers={"X-Tenant-Id": f"made-up-{number}"})
        await c.post(headers={"X-Tenant-Id": "last"})

        assert await c.metric("tenant_tokens_total", tenant=OTHER, kind="prompt") == 200.0
        assert await c.metric("tenant_tokens_total", tenant="last", kind="prompt") == 100.0


def test_a_mistake_in_router_yaml_is_told_with_the_path_to_it() -> None:
    data = {
        "instances": [{"url": "http://h:1"}],
        "tenants": {"named": {"acme": {"weight": -1}}},
    }
    with pytest.raises(ConfigError, match=r"^r\.yaml: tenants\.named\.acme\.weight: expected a"):
        RouterConfig.from_mapping(data, source="r.yaml")
