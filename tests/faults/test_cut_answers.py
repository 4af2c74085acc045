"""Answers that end at any byte: never is a part of one taken for the whole."""

from __future__ import annotations

import asyncio
from collections import Counter

import aiohttp
import openai
import pytest

from tests.faults.conftest import Routed, until
from tests.faults.load import CHAT, Load, Truncated, read_stream, read_whole, running

pytestmark = pytest.mark.anyio

NUM_TOKENS = 3
NUM_BYTES = 1_100
"""A little more than an answer has."""


@pytest.mark.parametrize("cut_by", ["close", "reset"])
@pytest.mark.parametrize("stream", [True, False])
async def test_an_answer_that_ends_at_any_byte_is_whole_or_known_not_to_be(
    fleet: Routed, stream: bool, cut_by: str
) -> None:
    ends: Counter[str] = Counter()
    num_heads = 0
    async with (
        fleet(1, token_s=0.0, prefill_s=0.0) as (router, (a,)),
        aiohttp.ClientSession() as session,
    ):
        body = {"model": "m", "messages": [], "stream": stream, "max_tokens": NUM_TOKENS}
        for cut_at in range(0, NUM_BYTES, 17):
            await a.control(cut_at=cut_at, cut_by=cut_by, num_cuts=1)
            num_heads += cut_at < 130
            try:
                async with session.post(router.url + CHAT, json=body) as response:
                    assert response.status == 200
                    await (read_stream if stream else read_whole)(response, NUM_TOKENS)
                    ends["whole"] += 1
            except Truncated:
                ends["truncated"] += 1
            except aiohttp.ClientError:
                ends["signalled"] += 1

    assert ends["truncated"] == 0
    if stream:
        assert ends["signalled"] > 20
        assert ends["whole"] >= num_heads  # before the first token nobody has noticed
    else:
        assert set(ends) == {"whole"}


async def test_an_engine_s_own_error_in_a_stream_is_its_end(fleet: Routed) -> None:
    async with fleet(2, cut_at=500, cut_by="error", token_s=0.0) as (router, _):
        async with aiohttp.ClientSession() as session:
            body = {"model": "m", "messages": [], "stream": True}
            async with session.post(router.url + CHAT, json=body) as response:
                received = bytearray()

                async def read() -> None:
                    while chunk := await response.content.readany():
                        received.extend(chunk)

                with pytest.raises(aiohttp.ClientPayloadError):
                    await read()

    assert b"EngineCore encountered an issue" in received
    assert b"[DONE]" not in received


async def test_an_engine_s_own_error_before_any_token_is_asked_for_elsewhere(
    fleet: Routed,
) -> None:
    head = len(
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n"
    )
    async with fleet(2, cut_at=head, cut_by="error") as (router, (a, b)):
        await b.control(cut_at=-1)
        async with openai.AsyncOpenAI(base_url=router.url + "/v1", api_key="k") as user:
            chunks = await user.chat.completions.create(model="m", messages=[], stream=True)
            text = "".join([c.choices[0].delta.content or "" async for c in chunks if c.choices])
        assert a.count("begin") == 1

    assert text == "t" * 8


@pytest.mark.parametrize("cut_by", ["close", "exit", "stop", "error", "end"])
async def test_the_sdk_raises_whatever_cuts_its_stream(fleet: Routed, cut_by: str) -> None:
    async with fleet(1, cut_at=500, cut_by=cut_by) as (router, (a,)):
        async with openai.AsyncOpenAI(base_url=router.url + "/v1", api_key="k") as user:
            chunks = await user.chat.completions.create(model="m", messages=[], stream=True)
            received = []
            with pytest.raises(openai.APIError):
                async with asyncio.timeout(5):
                    received.extend([chunk async for chunk in chunks])
        a.go_on()


async def test_the_sdk_raises_when_an_engine_gives_its_answer_up(fleet: Routed) -> None:
    async with fleet(1, token_s=0.02) as (router, (a,)):
        async with openai.AsyncOpenAI(base_url=router.url + "/v1", api_key="k") as user:
            chunks = await user.chat.completions.create(
                model="m", messages=[], stream=True, max_tokens=100
            )
            received = [await anext(chunks)]
            await a.control(closing="abort")
            with pytest.raises(openai.APIError, match="broke off its answer"):
                async with asyncio.timeout(5):
                    received.extend([chunk async for chunk in chunks])

    assert {choice.finish_reason for chunk in received for choice in chunk.choices} == {None}


async def test_an_answer_that_is_given_up_before_its_first_token_is_asked_for_elsewhere(
    fleet: Routed,
) -> None:
    async with fleet(2, router={"policy": "round-robin"}, prefill_s=0.4) as (router, (a, _)):
        async with running(Load(url=router.url, num_calls=1), 8) as load:
            await until(lambda: a.count("begin") >= 4)
            await a.control(closing="abort")
            assert a.count("first") == 0

    assert (load.tally.num_lost_runs, load.tally.num_truncated) == (0, 0)
    assert load.tally.signalled == []


async def test_a_text_that_speaks_of_giving_up_is_an_answer_like_others(fleet: Routed) -> None:
    token = '\\"finish_reason\\":\\"abort\\" "finish_reason":"abort"'
    async with fleet(1, token=token) as (router, _):
        load = Load(url=router.url, num_calls=1)
        await load.runs(4)

    assert (load.tally.num_lost_runs, load.tally.num_truncated) == (0, 0)
    assert load.tally.signalled == []
