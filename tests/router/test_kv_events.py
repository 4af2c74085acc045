"""What vLLM publishes of its KV cache, and what the router then believes to be cached where."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import zmq
import zmq.asyncio

from tests.builders import stage_request
from tests.fakes import USAGE, FakeEngine
from tests.router.conftest import Client, Routing
from tests.router.kv_messages import (
    CLEARED,
    HEAD,
    SIZE,
    a_stream,
    message,
    num_cached,
    removed,
    stored,
)
from vllm_workflow.core.errors import ConfigError
from vllm_workflow.core.events import Cleared, Event, Evicted
from vllm_workflow.router.config import RouterConfig
from vllm_workflow.router.kv_events import Stream
from vllm_workflow.router.kv_wire import MAX_MESSAGE_BYTES, read

pytestmark = pytest.mark.anyio


# What an instance publishes.


def test_what_an_instance_dropped_is_not_counted_as_cached_there() -> None:
    log: list[Event] = []
    stream, brain = a_stream(log)
    assert num_cached(brain) == 64

    stream.take(*read(message(1, removed(14), removed(13))))

    assert num_cached(brain) == 32
    assert log[-1] == Evicted(instance_id="a", chain_hashes=(2,))


def test_an_instance_that_cleared_its_cache_holds_nothing() -> None:
    log: list[Event] = []
    stream, brain = a_stream(log)

    stream.take(*read(message(1, CLEARED)))

    assert num_cached(brain) == 0
    assert log[-1] == Cleared(instance_id="a")


def test_a_server_that_began_anew_holds_nothing() -> None:
    stream, brain = a_stream([])
    stream.take(*read(message(1)))
    assert num_cached(brain) == 64

    stream.take(*read(message(0)))

    assert num_cached(brain) == 0


@pytest.mark.parametrize(
    "lose",
    [
        lambda stream: stream.take(*read(message(2))),
        lambda stream: stream.unreadable(),
    ],
    ids=["a message was missed", "one makes no sense"],
)
def test_where_reports_cannot_be_trusted_the_belief_stays(lose: Callable[[Stream], None]) -> None:
    stream, brain = a_stream([])

    lose(stream)
    stream.take(*read(message(3, removed(13))))

    assert num_cached(brain) == 64


def test_engines_with_layers_of_several_kinds_are_believed_only_to_be_empty() -> None:
    log: list[Event] = []
    stream, brain = a_stream(log)
    stream.take(*read(message(1, removed(99, group_idx=1))))
    call = stage_request("later", num_prompt_tokens=80, prefix=HEAD)
    stream.blocks.sent(call)

    stream.take(*read(message(2, stored("later", *range(20, 25)))))
    stream.blocks.ended("later", 80)
    stream.take(*read(message(3, removed(*range(10, 25)))))
    assert num_cached(brain) == 64
    stream.take(*read(message(4, CLEARED)))

    assert num_cached(brain) == 0


def test_blocks_outside_the_gpu_are_another_affair() -> None:
    stream, brain = a_stream([])

    stream.take(*read(message(1, removed(13) | {"medium": "CPU"})))

    assert num_cached(brain) == 64


# A router and a publisher.


class Publisher:
    """As vLLM's, of this test's events; knows when somebody listens."""

    def __init__(self, socket: zmq.asyncio.Socket, url: str) -> None:
        self.url = url
        self._socket = socket
        self._sequence = 0

    async def subscribed(self) -> None:
        async with asyncio.timeout(30):
            assert await self._socket.recv() == b"\x01"

    async def publish(self, *events: object) -> None:
        await self.raw(*message(self._sequence, *events))
        self._sequence += 1

    async def raw(self, *frames: bytes) -> None:
        await self._socket.send_multipart(frames)


@asynccontextmanager
async def publishing(url: str = "tcp://127.0.0.1:*") -> AsyncIterator[Publisher]:
    with zmq.asyncio.Context() as context, context.socket(zmq.XPUB) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.bind(url)
        yield Publisher(socket, socket.getsockopt_string(zmq.LAST_ENDPOINT))


def instances(engine: FakeEngine, publisher: Publisher) -> list[dict[str, Any]]:
    return [{"id": "a", "url": engine.url, "kv_events": publisher.url}]


PROMPT = [{"role": "user", "content": "x" * 5000}]
NUM_BLOCKS = int(USAGE["prompt_tokens"]) // SIZE  # type: ignore[call-overload]


async def call(client: Client, engine: FakeEngine, **fields: Any) -> str:
    """Make one, and return how the engine was told to call it."""
    async with client.post(messages=PROMPT, **fields) as response:
        assert response.status == 200
        await response.read()
    return str(engine.received[-1].body.get("session_id", ""))


async def believed(client: Client) -> int:
    """Pieces of prompts that the router believes the instance to hold."""
    account = client.router.dispatcher.fleet._accounts["a"]
    return len(account.kv)


async def until(client: Client, num_pieces: int) -> None:
    async with asyncio.timeout(30):
        while await believed(client) != num_pieces:
            await asyncio.sleep(0.01)


async def test_a_router_believes_what_its_instance_publishes(routing: Routing) -> None:
    async with FakeEngine().serving() as engine, publishing() as publisher:
        async with routing(instances=instances(engine, publisher), within_s=60) as client:
            await publisher.subscribed()
            session_id = await call(client, engine)
            assert await believed(client) == 2
            await publisher.publish(stored(session_id, *range(NUM_BLOCKS)))
            await publisher.publish(*(removed(block) for block in (5, 4, 3)))
            await until(client, 1)
            await publisher.publish(CLEARED)
            await until(client, 0)
            assert await client.metric("kv_events_total", instance="a", kind="BlockRemoved") == 3.0


async def test_junk_and_a_publisher_that_dies_hurt_nobody(routing: Routing) -> None:
    async with FakeEngine().serving() as engine:
        async with publishing() as publisher:
            config = instances(engine, publisher)
            async with routing(instances=config, within_s=100) as client:
                await publisher.subscribed()
                for junk in ([b""], [b"", b"1", b"2"], [b"", b"\0" * 8, b"\xc1"], [b"x"] * 9):
                    await publisher.raw(*junk)
                async with asyncio.timeout(30):
                    while (
                        await client.metric("kv_events_total", instance="a", kind="unreadable")
                        != 4.0
                    ):
                        await asyncio.sleep(0.01)
                publisher._socket.close()
                await call(client, engine)
                assert await believed(client) == 2
                async with publishing(publisher.url) as another:
                    await another.subscribed()
                    await another.publish(CLEARED)
                    await until(client, 0)


async def test_an_endpoint_that_is_none_and_an_instance_that_leaves_hurt_nobody(
    routing: Routing,
) -> None:
    async with FakeEngine().serving() as engine:
        config = [{"id": "a", "url": engine.url, "kv_events": "tcp://-:1"}]
        async with routing(instances=config) as client:
            labels = {"instance": "a", "kind": "unreadable"}
            while not await client.metric("kv_events_total", **labels):
                await asyncio.sleep(0.01)
            await call(client, engine)
            client.router.upstreams.drain("a")
            while await client.metric("kv_events_total", **labels) is not None:
                await asyncio.sleep(0.01)


async def test_messages_that_are_too_large_are_dropped_and_counted(routing: Routing) -> None:
    async with FakeEngine().serving() as engine, publishing() as publisher:
        async with routing(instances=instances(engine, publisher), within_s=60) as client:
            await publisher.subscribed()
            session_id = await call(client, engine)
            large = removed(1) | {"later": b"x" * MAX_MESSAGE_BYTES}
            await publisher.publish(large, CLEARED)
            await publisher.raw(*[b""] * 20_000)
            await publisher.publish(stored(session_id, *range(NUM_BLOCKS)))
            await publisher.publish(removed(3))
            await publisher.publish(CLEARED)
            await until(client, 0)
            for kind, num in (("too_large", 1.0), ("unreadable", 1.0), ("AllBlocksCleared", 1.0)):
                assert await client.metric("kv_events_total", instance="a", kind=kind) == num


async def test_a_client_s_own_session_stays_its_own(routing: Routing) -> None:
    async with FakeEngine().serving() as engine, publishing() as publisher:
        async with routing(instances=instances(engine, publisher), within_s=60) as client:
            assert await call(client, engine, vllm_xargs={"session_id": "mine"}) == ""
            assert await call(client, engine, session_id="mine") == "mine"
            assert await call(client, engine, vllm_xargs={"top": 1}) not in {"", "mine"}
            assert engine.received[-1].xargs == {"top": 1}


async def test_without_an_endpoint_nothing_is_added_to_a_call(routing: Routing) -> None:
    async with FakeEngine().serving() as engine, routing(engine) as client:
        assert await call(client, engine) == ""
        assert set(engine.received[-1].body) == {"model", "messages"}


@pytest.mark.parametrize(
    "endpoint",
    [
        *("http://h:1", "tcp://h", "tcp://:5", "tcp://h:5/x", "tcp://h:99999"),
        *("tcp://*:5557", "tcp://user@h:5", "tcp://h:5?x", "tcp://h:5#x"),
    ],
)
def test_an_endpoint_that_cannot_be_is_refused(endpoint: str) -> None:
    data = {"instances": [{"url": "http://127.0.0.1:1", "kv_events": endpoint}]}

    with pytest.raises(ConfigError, match="kv_events"):
        RouterConfig.from_mapping(data, source="router.yaml")
