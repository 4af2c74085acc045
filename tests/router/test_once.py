"""Calls that are sent again while they run."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import openai
import pytest
from aiohttp import web

from tests.fakes import FakeEngine, listening
from tests.router.conftest import CHAT, Client, Routing
from vllm_workflow.client import attach
from vllm_workflow.router.answer import MAX_HELD_BYTES
from vllm_workflow.router.exchange import Answer, Reply
from vllm_workflow.router.headers import Headers
from vllm_workflow.router.once import Key, Once
from vllm_workflow.router.plain import PlainExchange

pytestmark = pytest.mark.anyio

KEY = {"Idempotency-Key": "k"}
ANSWER = Answer(200, Headers(), b"answer")


def client() -> PlainExchange:
    """A client of whose connection nothing is asked."""
    nothing: Any = None
    return PlainExchange(nothing, CHAT, Headers.of([("Content-Length", "0")]))


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

    async def slow(reply: Reply) -> Answer:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            given_up.set()
            await unwound.wait()
            raise
        raise AssertionError

    async def prompt(reply: Reply) -> Answer:
        unwound.set()
        await asyncio.sleep(0)
        return ANSWER

    first = asyncio.ensure_future(once.answer(key, b"", client(), slow, again=True))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    first.cancel()
    await given_up.wait()

    async with asyncio.timeout(5):
        answer = await once.answer(key, b"", client(), prompt, again=True)
    assert answer is ANSWER
    assert len(once) == 0


async def test_a_call_that_has_been_given_up_does_not_end_the_one_after_it() -> None:
    once, key = Once(), Key("", "", "", "Idempotency-Key", "k")
    over = asyncio.Event()

    async def answer(reply: Reply) -> Answer:
        await over.wait()
        return ANSWER

    first = asyncio.ensure_future(once.answer(key, b"", client(), answer, again=True))
    await asyncio.sleep(0)
    first.cancel()
    second = asyncio.ensure_future(once.answer(key, b"", client(), answer, again=True))
    await asyncio.wait([first])
    await asyncio.sleep(0)
    assert len(once) == 1  # whoever comes now joins the second
    over.set()

    assert await second is ANSWER


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


@dataclass
class Long:
    """An engine whose answers are longer than what is held of one, and wait before their end."""

    body: bytes = b'{"a":"' + b"x" * (2 * MAX_HELD_BYTES) + b'"}'
    num_calls: int = 0
    may_begin: asyncio.Event = field(default_factory=asyncio.Event)
    may_end: asyncio.Event = field(default_factory=asyncio.Event)
    given_up: asyncio.Event = field(default_factory=asyncio.Event)

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[str]:
        app = web.Application()
        app.router.add_get("/health", self._health)
        app.router.add_post(CHAT, self._answer)
        async with listening(app) as url:
            yield url

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        await request.read()
        self.num_calls += 1
        try:
            await self.may_begin.wait()
            headers = {"Content-Type": "application/json", "Content-Length": str(len(self.body))}
            response = web.StreamResponse(headers=headers)
            await response.prepare(request)
            await response.write(self.body[:-1])
            await self.may_end.wait()
            await response.write(self.body[-1:])
        except (asyncio.CancelledError, ConnectionResetError):
            self.given_up.set()
            raise
        return response


@pytest.mark.parametrize("how", [{}, {"TE": "for-aiohttp"}], ids=str)
async def test_of_a_long_answer_no_more_is_held_because_it_may_be_asked_for_again(
    routing: Routing, how: dict[str, str]
) -> None:
    engine = Long()
    engine.may_begin.set()
    async with engine.serving() as url, routing(url) as client:
        async with client.post(headers=KEY | how) as response:
            # A part of it is here before the rest was sent.
            received = await response.content.readexactly(MAX_HELD_BYTES)
            status, answer = await send(client, headers=KEY)
            engine.may_end.set()
            received += await response.read()

    assert (status, answer["error"]["code"]) == (409, "already_running")
    assert received == engine.body
    assert engine.num_calls == 1


async def test_of_those_who_wait_for_a_long_answer_the_last_one_gets_it(routing: Routing) -> None:
    engine = Long()
    engine.may_end.set()
    async with engine.serving() as url, routing(url) as client:
        calls = []
        for num_waiting in range(1, 4):
            calls.append(send(client, headers=KEY))
            await until_waiting(client, num_waiting)
        engine.may_begin.set()
        answers = await asyncio.gather(*calls)
        assert len(client.router.proxy.running) == 0

    assert [status for status, _ in answers] == [409, 409, 200]
    assert answers[0][1]["error"]["code"] == "already_running"
    assert len(answers[2][1]["a"]) == 2 * MAX_HELD_BYTES
    assert engine.num_calls == 1


async def test_a_long_answer_goes_to_nobody_who_has_just_left() -> None:
    once, key = Once(), Key("", "", "", "Idempotency-Key", "k")
    readers: list[object] = []
    may_begin = asyncio.Event()

    class Noting(PlainExchange):
        async def begin(self, answer: Answer) -> None:
            readers.append(self)

    async def long(reply: Reply) -> Answer:
        await may_begin.wait()
        await reply.begin(ANSWER)
        return ANSWER._replace(body=None)

    nothing: Any = None
    first, second = (Noting(nothing, CHAT, Headers.of([("Content-Length", "0")])) for _ in "ab")
    calls = []
    for exchange in (first, second):
        call = asyncio.ensure_future(once.answer(key, b"", exchange, long, again=True))
        await asyncio.sleep(0)
        calls.append(call)
    await asyncio.sleep(0)
    may_begin.set()
    calls[1].cancel()

    assert (await calls[0]).body is None
    assert readers == [first]


async def test_a_long_answer_is_given_up_when_its_reader_has_left(routing: Routing) -> None:
    engine = Long()
    engine.may_begin.set()
    async with engine.serving() as url, routing(url) as client:
        async with client.post(headers=KEY) as response:
            await response.content.readexactly(MAX_HELD_BYTES)
        async with asyncio.timeout(30):
            await engine.given_up.wait()
            while len(client.router.proxy.running):
                await asyncio.sleep(0.001)
