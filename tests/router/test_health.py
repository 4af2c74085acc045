"""What probes are told."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.fakes import FakeEngine
from tests.router.conftest import Client, Routing, until
from tests.router.operators import ADMIN
from tests.router.operators import KEY as OPERATORS_KEY
from tests.router.test_access import AUTH, KEY, bearer
from vllm_workflow.router.health import package_version

pytestmark = pytest.mark.anyio


async def told(client: Client, path: str, key: str = "") -> tuple[int, dict[str, Any]]:
    headers = bearer(key) if key else {}
    async with client.session.get(client.router.url + path, headers=headers) as response:
        return response.status, await response.json()


async def test_health_tells_the_version_and_the_policy_in_force(routing: Routing) -> None:
    async with FakeEngine().serving() as engine, routing(engine) as client:
        assert await told(client, "/health") == (
            200,
            {
                "healthy": True,
                "version": package_version(),
                "policy": client.router.dispatcher.config.fingerprint,
                "instances": {"a": True},
            },
        )


async def test_without_an_instance_it_is_live_and_not_ready(routing: Routing) -> None:
    async with FakeEngine(health=500).serving() as engine, routing(engine) as client:
        assert await told(client, "/live") == (200, {"live": True})
        assert await told(client, "/ready") == (503, {"ready": False})
        status, answer = await told(client, "/health")
        assert (status, answer["healthy"]) == (503, False)


async def test_with_keys_names_are_for_those_who_have_one(routing: Routing) -> None:
    async with (
        FakeEngine().serving() as engine,
        routing(engine, auth=AUTH, admin=ADMIN) as client,
    ):
        for key in ("", "vw-nothing"):
            assert await told(client, "/health", key) == (200, {"healthy": True})
        for key in (KEY, OPERATORS_KEY):
            status, answer = await told(client, "/health", key)
            assert (status, answer["version"]) == (200, package_version())
        assert (await told(client, "/ready"))[0] == (await told(client, "/live"))[0] == 200


async def test_they_do_not_depend_on_load(routing: Routing) -> None:
    async with FakeEngine(held=True).serving() as engine, routing(engine, seats=1) as client:
        calls = [asyncio.ensure_future(client.post().__aenter__()) for _ in range(60)]
        await engine.wait_for(received=1)
        await until(lambda: len(client.router.dispatcher.waiting) == 59)
        for path in ("/live", "/ready", "/health"):
            assert (await told(client, path))[0] == 200
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        await until(lambda: not client.router.dispatcher.num_in_flight)
