"""Runs that come faster than the instances can keep their promises."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.fakes import FakeEngine
from tests.router.conftest import Client, Routing

pytestmark = pytest.mark.anyio

REJECTING: dict[str, Any] = {
    "late_binding": True,
    "relegate": True,
    "admission": "reject",
    "max_hold_share": 0.0,
}
SLO_MS = "1200"
"""Half as much again as one of these calls needs, by the default latency model."""


async def begin(client: Client, number: int, answers: list[tuple[int, Any, Any]]) -> None:
    headers = {"X-Workflow-Id": f"run-{number}", "X-Workflow-Slo-Ms": SLO_MS}
    async with client.post(headers=headers) as response:
        answers.append((response.status, await response.json(), response.headers))


async def test_a_run_that_would_begin_too_late_is_told_when_to_come_again(
    routing: Routing,
) -> None:
    answers: list[tuple[int, Any, Any]] = []
    async with (
        FakeEngine(held=True).serving() as engine,
        routing(engine, seats=500, policy=REJECTING) as client,
        asyncio.TaskGroup() as tasks,
    ):
        num_runs = 0
        while not answers:
            assert num_runs < 90, "no run is refused"
            tasks.create_task(begin(client, num_runs, answers))
            num_runs += 1
            async with asyncio.timeout(5):
                while len(engine.received) + len(answers) < num_runs:
                    await asyncio.sleep(0.002)
        under_way = {"X-Workflow-Id": "run-0", "X-Workflow-Slo-Ms": SLO_MS}
        again = tasks.create_task(_status(client, under_way))
        ordinary = tasks.create_task(_status(client, {}))
        await engine.wait_for(received=num_runs + 1)
        assert await client.metric("runs_refused_total", workflow="") == 1.0
        assert await client.metric("requests_held") == 0.0

        engine.release(num_runs + 1)
    status, body, headers = answers[0]
    assert status == 503
    assert int(headers["Retry-After"]) >= 1
    assert body["error"]["code"] == "overloaded"
    assert "wait to begin" in body["error"]["message"]
    assert [again.result(), ordinary.result()] == [200, 200]


async def _status(client: Client, headers: dict[str, str]) -> int:
    async with client.post(headers=headers) as response:
        await response.read()
        return int(response.status)
