"""Calls that wait in the router until an instance has room."""

from __future__ import annotations

import asyncio

import pytest

from tests.fakes import FakeEngine
from tests.router.conftest import Client, Routing

pytestmark = pytest.mark.anyio

LATE = {"dispatch": "predicted-finish", "ordering": "deadline", "late_binding": True}


def waiting(client: Client) -> int:
    return len(client.router.dispatcher.waiting)


async def until(client: Client, *, num_waiting: int) -> None:
    async with asyncio.timeout(5):
        while waiting(client) != num_waiting:
            await asyncio.sleep(0.005)


async def call(client: Client, ended: list[str], name: str, **headers: str) -> None:
    async with client.post(headers={"X-Workflow-Id": name, **headers}) as response:
        await response.read()
        assert response.status == 200
    ended.append(name)


async def test_the_router_keeps_what_no_instance_can_start_and_sends_it_in_order(
    routing: Routing,
) -> None:
    async with (
        FakeEngine(held=True).serving() as engine,
        routing(engine, seats=1, policy=LATE) as client,
        asyncio.TaskGroup() as tasks,
    ):
        ended: list[str] = []
        tasks.create_task(call(client, ended, "first"))
        await engine.wait_for(received=1)
        for number, (name, budget_ms) in enumerate((("late", "90000"), ("early", "30000")), 1):
            tasks.create_task(call(client, ended, name, **{"X-Workflow-Budget-Ms": budget_ms}))
            await until(client, num_waiting=number)
        assert len(engine.received) == 1

        engine.release(3)
    assert ended == ["first", "early", "late"]


async def test_a_client_that_leaves_while_it_waits_is_forgotten(routing: Routing) -> None:
    async with (
        FakeEngine(held=True).serving() as engine,
        routing(engine, seats=1, policy=LATE) as client,
        asyncio.TaskGroup() as tasks,
    ):
        ended: list[str] = []
        tasks.create_task(call(client, ended, "first"))
        await engine.wait_for(received=1)
        gone = tasks.create_task(call(client, ended, "gone"))
        await until(client, num_waiting=1)

        gone.cancel()
        await until(client, num_waiting=0)
        engine.release()
    assert ended == ["first"]
    assert len(engine.received) == 1


async def test_clients_that_come_and_go_at_any_moment_leave_nothing_behind(
    routing: Routing,
) -> None:
    async with (
        FakeEngine().serving() as engine,
        routing(engine, seats=2, policy=LATE) as client,
    ):
        for round_ in range(30):
            calls = [asyncio.create_task(call(client, [], f"{round_}-{i}")) for i in range(8)]
            await asyncio.sleep(0.0005 * round_)
            for each in calls[::2]:
                each.cancel()
            await asyncio.gather(*calls, return_exceptions=True)
            assert all(each.cancelled() or each.exception() is None for each in calls)
        async with asyncio.timeout(5):
            while client.router.dispatcher.num_in_flight or waiting(client):
                await asyncio.sleep(0.005)
