"""Calls that wait in the router until an instance has room."""

from __future__ import annotations

import asyncio
import time

import pytest

from tests.fakes import FakeEngine
from tests.router.conftest import Client, Routing
from vllm_workflow.core.types import Decision, Outcome, StageRequest
from vllm_workflow.router.prefixes import head_of
from vllm_workflow.router.tries import Tries

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


async def test_clients_that_leave_as_they_are_bound_take_nobody_s_turn(routing: Routing) -> None:
    async with (
        FakeEngine(held=True).serving() as engine,
        routing(engine, seats=2, policy=LATE) as client,
    ):
        binder, dispatcher = client.router.proxy._binder, client.router.dispatcher

        def ask(name: str) -> asyncio.Task[Decision]:
            call = StageRequest(request_id=name, arrival_time=time.monotonic(), model="m")
            tries = Tries(lambda: None, 0.0, lambda instance_id: 0)
            return asyncio.create_task(binder.bind(call, num_prompt_bytes=1, tries=tries))

        def settle(decision: Decision) -> None:
            binder.settle(Outcome(request_id=decision.request_id, instance_id="a", ok=False))

        first, second = await ask("first"), await ask("second")
        leaving = [ask("leaving-1"), ask("leaving-2")]
        staying = [ask("staying-1"), ask("staying-2")]
        await until(client, num_waiting=4)
        settle(first)
        settle(second)  # binds those that leave in the same moment
        for task in leaving:
            task.cancel()

        async with asyncio.timeout(5):
            for decision in await asyncio.gather(*staying):
                settle(decision)
        assert dispatcher.num_in_flight == 0


def mark(client: Client, *, healthy: bool) -> None:
    upstreams = client.router.upstreams
    upstreams._mark(upstreams["a"], healthy, "scripted")


async def test_a_call_whose_last_instance_dies_while_it_waits_is_told_so_in_time(
    routing: Routing,
) -> None:
    async with (
        FakeEngine(held=True, health=503).serving() as engine,
        routing(engine, seats=1, policy=LATE, max_wait_s=0.2) as client,
        asyncio.TaskGroup() as tasks,
    ):
        mark(client, healthy=True)
        tasks.create_task(call(client, [], "first"))
        await engine.wait_for(received=1)
        waiting_call = tasks.create_task(client.post().__aenter__())
        await until(client, num_waiting=1)

        mark(client, healthy=False)

        response = await waiting_call
        assert (response.status, response.headers["Retry-After"]) == (503, "1")
        engine.release()


async def test_calls_that_wait_for_an_instance_to_come_back_go_in_the_order_of_the_policy(
    routing: Routing,
) -> None:
    async with (
        FakeEngine(held=True).serving() as engine,
        routing(engine, seats=1, policy=LATE) as client,
    ):
        ended: list[str] = []
        mark(client, healthy=False)
        async with asyncio.TaskGroup() as tasks:
            for name, budget_ms in (("late", "90000"), ("early", "30000")):
                tasks.create_task(call(client, ended, name, **{"X-Workflow-Budget-Ms": budget_ms}))
                while client.router.proxy._binder.num_stranded < len(tasks._tasks):
                    await asyncio.sleep(0.005)
            engine.release(2)
            mark(client, healthy=True)
    assert ended == ["early", "late"]


def test_the_head_of_a_prompt_is_the_same_whatever_follows() -> None:
    messages = [{"role": "user", "content": "x" * 300} for _ in range(40)]
    longer = [*messages, {"role": "user", "content": "y" * 9_000}]

    head = head_of({"messages": messages})

    assert len(head) == 6
    assert head_of({"messages": longer})[: len(head) - 1] == head[:-1]


def test_the_head_of_a_prompt_of_parts_and_texts_is_the_same_whatever_follows() -> None:
    text = {"role": "user", "content": "x" * 3_000}
    parts = {"role": "user", "content": [{"type": "text", "text": "y" * 3_000}]}
    messages = [text, parts, text, *[parts] * 20]

    for number in range(1, len(messages)):
        head = head_of({"messages": messages[:number]})
        assert head_of({"messages": messages})[: len(head) - 1] == head[:-1]
    other = [{**text, "role": "tool"}, *messages[1:]]
    assert head_of({"messages": other})[0] != head_of({"messages": messages})[0]


def test_of_a_huge_prompt_only_the_beginning_is_looked_at() -> None:
    assert len(head_of({"prompt": list(range(1_000_000))})) == 256
    assert len(head_of({"prompt": "x" * 5_000_000})) == 256
    assert head_of({"prompt": {"not": "a prompt"}}) == head_of({}) == ()
