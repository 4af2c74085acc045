"""Streams of `/v1/responses`: they have no `[DONE]`, their last event says that they are whole."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import aiohttp
import openai
import pytest

from tests.fakes import FakeEngine
from tests.router.conftest import Routing

pytestmark = pytest.mark.anyio

RESPONSES = "/v1/responses"
FINAL = ("response.completed", "response.incomplete", "response.failed")


def event(kind: str, end: str = "\n", **members: Any) -> bytes:
    """Return an event as vLLM writes it, its type as the last member."""
    data = json.dumps({**members, "sequence_number": 0, "type": kind}, separators=(",", ":"))
    return f"event: {kind}{end}data: {data}{end}{end}".encode()


def delta(text: str) -> bytes:
    return event("response.output_text.delta", delta=text, item_id="i", output_index=0)


CREATED = event("response.created", response={"status": "in_progress", "output": []})


async def read(response: aiohttp.ClientResponse) -> tuple[bytes, bool]:
    """Return what has come, and whether it came to its end."""
    received = bytearray()
    try:
        while chunk := await response.content.readany():
            received += chunk
    except aiohttp.ClientPayloadError:
        return bytes(received), False
    return bytes(received), True


def cuts(data: bytes, num_bytes: int) -> Iterator[bytes]:
    return (data[i : i + num_bytes] for i in range(0, len(data), num_bytes))


def whole() -> Iterator[Any]:
    for kind in FINAL:
        yield pytest.param([delta("a"), event(kind, response={})], id=kind)
    last = event(FINAL[0], response={})
    yield pytest.param([last + b"data: [DONE]\n\n"], id="with-done")
    yield pytest.param([event(FINAL[0], "\r\n", response={})], id="crlf")
    yield pytest.param([last.partition(b"\n")[2]], id="type-last")
    yield pytest.param([b'data: {"type": "response.completed", "response": {}}\n\n'], id="type-1st")
    yield pytest.param([*cuts(last, 1)], id="bytes")
    large = event(FINAL[0], response={"output": "a" * 3_000_000})
    yield pytest.param([*cuts(delta("a") + large, 100_001)], id="large")
    yield pytest.param([*cuts((delta("a") + large).partition(b"\n")[2], 100_001)], id="large-last")


@pytest.mark.parametrize("pieces", list(whole()))
async def test_a_response_that_has_its_final_event_is_passed_on_as_it_is(
    routing: Routing, pieces: list[bytes]
) -> None:
    async with FakeEngine(pieces=(CREATED, *pieces)).serving() as engine, routing(engine) as client:
        async with client.post(path=RESPONSES, stream=True) as response:
            received = await read(response)
        assert not await client.metric("broken_answers_total", instance="a")

    assert received == (CREATED + b"".join(pieces), True)


LARGE = event(FINAL[0], response={"output": "a" * 3_000_000})


@pytest.mark.parametrize(
    "pieces",
    [
        [delta("a")],
        [delta("a"), b"data: [DONE]\n\n"],
        [delta('"type":"response.completed"}\nevent: response.completed\n')],
        [delta("a"), event(FINAL[0], response={})[:-20]],
        [delta("a"), event(FINAL[0], response={})[:-1]],
        [*cuts(LARGE[:-20], 100_001)],
    ],
    ids=["text", "done", "text-that-speaks-of-it", "cut", "cut-before-its-end", "large-cut"],
)
async def test_a_response_without_its_final_event_ends_as_broken(
    routing: Routing, pieces: list[bytes]
) -> None:
    async with FakeEngine(pieces=(CREATED, *pieces)).serving() as engine, routing(engine) as client:
        async with client.post(path=RESPONSES, stream=True) as response:
            received, has_ended = await read(response)
        assert await client.metric("broken_answers_total", instance="a") == 1

    error = json.loads(received.removesuffix(b"\n\n").rpartition(b"\n\ndata: ")[2])
    assert error["error"]["code"] == "upstream_lost"
    assert not has_ended


async def test_the_sdk_raises_at_a_response_without_its_final_event(routing: Routing) -> None:
    pieces = (CREATED, delta("a"))
    async with FakeEngine(pieces=pieces).serving() as engine, routing(engine) as client:
        async with openai.AsyncOpenAI(base_url=client.router.url + "/v1", api_key="k") as user:
            events = await user.responses.create(model="m", input="a", stream=True)
            with pytest.raises(openai.APIError, match="broke off its answer"):
                async for _ in events:
                    pass
