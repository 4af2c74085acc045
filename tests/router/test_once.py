"""Calls that are sent again while they run."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest
from aiohttp import web

from tests.fakes import FakeEngine
from tests.router.conftest import Client, Routing
from vllm_workflow.client import attach
from vllm_workflow.router.once import Key, Once

pytestmark = pytest.mark.anyio

KEY = {"Idempotency-Key": "k"}


async def until_waiting(client: Client, num_waiting: int) -> None:
    async with asyncio.timeout(5):
        while (
            sum(r.num_waiting for r in client.router.proxy.running._running.values()) != num_waiting
        ):
            await asyncio.sleep(0.002)


def send(client: Client, **how: Any) -> asyncio.Task[Any]:
    async def call() -> tuple[int, dict[str, Any]]:
        async with client.post(**how) as response:
            return response.status, await response.json()

    return asyncio.create_task(call())


async def test_a_call_sent_twice_runs_once_and_both_get_its_answer(routing: Routing) -> None:
    async with FakeEngine(held=True).serving() as engine, routing(engine) as client:
        calls = [send(client, headers=KEY) for _ in range(2)]
        await until_waiting(client, 2)
        engine.release(2)
        first, second = await asyncio.gather(*calls)

        assert first == second
        assert first[0] == 200
        assert len(engine.received) == 1
        assert len(client.router.proxy.running) == 0


async def test_the_first_may_leave_the_second_still_gets_the_answer(routing: Routing) -> None:
    async with FakeEngine(held=True).serving() as engine, routing(engine) as client:
        first = send(client, headers=KEY)
        await engine.wait_for(received=1)
        second = send(client, headers=KEY)
        await until_waiting(client, 2)
        first.cancel()
        await until_waiting(client, 1)
        engine.release()

        assert (await second)[0] == 200
        assert (len(engine.received), engine.num_aborted) == (1, 0)


async def test_when_all_have_left_the_engine_is_freed(routing: Routing) -> None:
    async with FakeEngine(held=True).serving() as engine, routing(engine) as client:
        calls = [send(client, headers=KEY) for _ in range(3)]
        await until_waiting(client, 3)
        await engine.wait_for(received=1)
        for call in calls:
            call.cancel()

        await engine.wait_for(aborted=1)


async def test_who_comes_when_all_have_just_left_gets_an_answer() -> None:
    once, key = Once(), Key("", "", "", "Idempotency-Key", "k")
    given_up, unwound = asyncio.Event(), asyncio.Event()

    async def slow() -> web.Response:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            given_up.set()
            await unwound.wait()
            raise
        raise AssertionError

    async def prompt() -> web.Response:
        unwound.set()
        await asyncio.sleep(0)
        return web.Response(text="answer")

    first = asyncio.ensure_future(once.answer(key, b"", slow, again=True))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    first.cancel()
    await given_up.wait()

    async with asyncio.timeout(5):
        answer = await once.answer(key, b"", prompt, again=True)
    assert answer.text == "answer"
    assert len(once) == 0


async def test_a_call_that_has_been_given_up_does_not_end_the_one_after_it() -> None:
    once, key = Once(), Key("", "", "", "Idempotency-Key", "k")
    over = asyncio.Event()

    async def answer() -> web.Response:
        await over.wait()
        return web.Response(text="answer")

    first = asyncio.ensure_future(once.answer(key, b"", answer, again=True))
    await asyncio.sleep(0)
    first.cancel()
    second = asyncio.ensure_future(once.answer(key, b"", answer, again=True))
    await asyncio.wait([first])
    await asyncio.sleep(0)
    assert len(once) == 1  # whoever comes now joins the second
    over.set()

    assert (await second).text == "answer"


async def test_it_runs_again_once_it_has_ended(routing: Routing) -> None:
    async with FakeEngine().serving() as engine, routing(engine) as client:
        for _ in range(2):
            assert (await send(client, headers=KEY))[0] == 200

        assert len(engine.received) == 2


@pytest.mark.parametrize(
    "other",
    [{"Authorization": "Bearer other"}, {"X-Tenant-Id": "other"}, {"X-Workflow-Id": "other"}],
)
async def test_the_same_key_of_somebody_else_is_another_call(
    routing: Routing, other: dict[str, str]
) -> None:
    async with FakeEngine(held=True).serving() as engine, routing(engine) as client:
        calls = [send(client, headers=KEY | headers) for headers in ({}, other)]
        await engine.wait_for(received=2)
        engine.release(2)

        assert [status for status, _ in await asyncio.gather(*calls)] == [200, 200]


async def test_a_key_under_which_something_else_runs_is_refused(routing: Routing) -> None:
    async with FakeEngine(held=True).serving() as engine, routing(engine) as client:
        first = send(client, headers=KEY)
        await engine.wait_for(received=1)
        status, answer = await send(client, headers=KEY, max_tokens=7)
        engine.release()
        await first

    assert (status, answer["error"]["code"]) == (422, "idempotency_key_reused")


async def test_a_stream_that_is_being_read_is_not_sent_twice(routing: Routing) -> None:
    async with FakeEngine(held=True).serving() as engine, routing(engine) as client:
        engine.release()
        async with client.post(headers=KEY, stream=True) as response:
            await response.content.readuntil(b"\n\n")
            status, answer = await send(client, headers=KEY, stream=True)
            engine.release(2)
            await response.read()
        assert (status, answer["error"]["code"]) == (409, "already_running")

        # SDKs try again after a 409, and find it ended, or given up by its first reader.
        engine.release(3)
        async with client.post(headers=KEY, stream=True) as response:
            await response.read()
            assert response.status == 200
    assert len(engine.received) == 2


async def test_an_sdk_that_names_its_requests_is_known_by_that_name(routing: Routing) -> None:
    def headers(retry: int) -> dict[str, str]:
        return {"X-Request-Id": "r", "x-stainless-retry-count": str(retry)}

    async with FakeEngine(held=True).serving() as engine, routing(engine) as client:
        first = send(client, headers=headers(0))
        await engine.wait_for(received=1)
        again = send(client, headers=headers(1))
        await until_waiting(client, 2)
        # Not sent again, but by somebody with the same name; and sent again, but not the same.
        others = [send(client, headers=headers(0)), send(client, headers=headers(1), max_tokens=7)]
        await engine.wait_for(received=3)
        engine.release(3)
        answers = await asyncio.gather(first, again, *others)

    assert [status for status, _ in answers] == [200] * 4
    assert len(engine.received) == 3


async def test_an_attached_sdk_that_tries_again_says_that_it_is_the_same_call(
    routing: Routing,
) -> None:
    async with FakeEngine(held=True).serving() as engine, routing(engine) as client:
        user = attach(
            openai.AsyncOpenAI(base_url=client.router.url + "/v1", api_key="k", max_retries=1)
        )
        async with user:
            call = asyncio.create_task(
                user.chat.completions.create(model="m", messages=[], timeout=0.2)
            )
            await engine.wait_for(received=2, aborted=1)
            engine.release()
            await call

        keys = {received.header("Idempotency-Key") for received in engine.received}
        assert len(keys) == 1
        assert None not in keys
