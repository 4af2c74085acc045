"""What vLLM publishes of its KV cache, and what the router then believes to be cached where."""

from __future__ import annotations

import asyncio
import tracemalloc
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import msgspec
import pytest
import zmq
import zmq.asyncio
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter

from tests.builders import dispatcher, instance, outcome, stage_request
from tests.fakes import USAGE, FakeEngine
from tests.router.conftest import Client, Routing
from vllm_workflow.core.dispatcher import Dispatcher
from vllm_workflow.core.errors import ConfigError
from vllm_workflow.core.events import Cleared, Event, Evicted
from vllm_workflow.core.prefix import Chain, Segment
from vllm_workflow.router import kv_wire
from vllm_workflow.router.config import RouterConfig
from vllm_workflow.router.kv_blocks import MAX_CALLS, Blocks
from vllm_workflow.router.kv_events import Stream
from vllm_workflow.router.kv_wire import MAX_MESSAGE_BYTES, UnreadableError, _take, read

pytestmark = pytest.mark.anyio
SIZE = 16
HEAD: Chain = (Segment(1, 32), Segment(2, 32))
"""Two pieces of two blocks each, in a prompt of 80 tokens."""


def stored(session_id: str | None, *hashes: int, parent: int | None = None) -> dict[str, Any]:
    return {
        "type": "BlockStored",
        "block_hashes": list(hashes),
        "parent_block_hash": parent,
        "token_ids": [0] * SIZE * len(hashes),
        "block_size": SIZE,
        "lora_id": None,
        "medium": "GPU",
        "lora_name": None,
        "group_idx": 0,
        "session_id": session_id,
    }


def removed(*hashes: int, **fields: Any) -> dict[str, Any]:
    return {"type": "BlockRemoved", "block_hashes": list(hashes), "medium": "GPU", **fields}


CLEARED = {"type": "AllBlocksCleared"}


def message(sequence: int, *events: object) -> list[bytes]:
    batch = [1.0, list(events), 0]
    return [b"", sequence.to_bytes(8, "big"), msgspec.msgpack.encode(batch)]


# Blocks.


def store(blocks: Blocks, session_id: str | None, *hashes: int, parent: int | None = None) -> Any:
    return blocks.stored(session_id, hashes, parent=parent, block_size=SIZE)


def test_a_piece_is_gone_with_the_block_that_it_ends_in() -> None:
    blocks = Blocks()
    blocks.sent(stage_request("a", num_prompt_tokens=80, prefix=HEAD))
    store(blocks, "a", 10, 11)
    store(blocks, "a", 12, 13, 14, parent=11)
    blocks.ended("a", 80)

    assert blocks.removed([14]) == []
    assert blocks.removed([13]) == [2]
    assert blocks.removed([12, 11]) == [1]
    assert len(blocks) == 0


def test_blocks_that_a_call_found_in_the_cache_are_its_too() -> None:
    blocks = Blocks()
    for name in "ab":
        blocks.sent(
            stage_request(name, num_prompt_tokens=80, prefix=(HEAD[0], Segment(ord(name), 32)))
        )
    store(blocks, "a", 10, 11, 12, 13, 14)
    store(blocks, "b", 10, 11)
    store(blocks, "b", 22, 23, 24, parent=11)
    blocks.ended("b", 80)
    blocks.ended("a", 80)

    assert blocks.removed([23]) == [ord("b")]
    assert blocks.removed([13]) == [ord("a")]
    assert blocks.removed([11]) == [1]


def test_a_prompt_of_more_tokens_than_was_guessed_ends_in_later_blocks() -> None:
    blocks = Blocks()
    blocks.sent(stage_request("a", num_prompt_tokens=80, prefix=HEAD))
    store(blocks, "a", *range(10, 20))
    blocks.ended("a", 160)

    assert blocks.removed([11, 12]) == []
    assert blocks.removed([13]) == [1]
    assert blocks.removed([17]) == [2]


def test_reports_may_come_after_the_answer() -> None:
    blocks = Blocks()
    blocks.sent(stage_request("a", num_prompt_tokens=80, prefix=HEAD))
    store(blocks, "a", 10, 11)
    assert blocks.ended("a", 80) == []
    store(blocks, "a", 12, 13, 14, parent=11)

    assert blocks.removed([13]) == [2]


def test_what_was_dropped_before_the_call_had_ended_is_gone_at_its_end() -> None:
    blocks = Blocks()
    blocks.sent(stage_request("a", num_prompt_tokens=80, prefix=HEAD))
    store(blocks, "a", 10, 11, 12, 13, 14)
    assert blocks.removed([13]) == []

    assert blocks.ended("a", 80) == [2]


def test_blocks_whose_beginning_was_not_reported_say_nothing() -> None:
    blocks = Blocks()
    blocks.sent(stage_request("a", num_prompt_tokens=80, prefix=HEAD))
    store(blocks, "a", 12, 13, 14, parent=11)
    blocks.ended("a", 80)

    assert blocks.removed([11, 12, 13, 14]) == []


def test_calls_that_never_end_are_forgotten() -> None:
    blocks = Blocks()
    for number in range(MAX_CALLS + 1):
        blocks.sent(stage_request(str(number), num_prompt_tokens=80, prefix=HEAD))
    for name, first in (("0", 10), ("1", 20)):
        store(blocks, name, *range(first, first + 5))
        blocks.ended(name, 80)

    assert blocks.removed([13]) == []
    assert blocks.removed([23]) == [2]


hashes = st.integers(0, 12)
reports = st.one_of(
    st.tuples(st.just("sent"), st.sampled_from("abc"), st.integers(1, 90)),
    st.tuples(st.just("ended"), st.sampled_from("abc"), st.none() | st.integers(1, 200)),
    st.tuples(st.just("stored"), st.sampled_from("abcd"), st.lists(hashes), st.none() | hashes),
    st.tuples(st.just("removed"), st.lists(hashes)),
    st.tuples(st.just("cleared")),
    st.tuples(st.just("lost")),
)


@given(st.lists(reports, max_size=40))
def test_whatever_is_reported_only_pieces_of_calls_that_were_sent_are_let_go(
    script: list[tuple[Any, ...]],
) -> None:
    blocks = Blocks()
    sent: set[int] = set()
    for what, *rest in script:
        gone: list[int] = []
        if what == "sent":
            name, num_tokens = rest
            head = (Segment(ord(name), 32), Segment(ord(name) + 1000, 32))
            sent |= {segment.chain_hash for segment in head}
            blocks.sent(stage_request(name, num_prompt_tokens=num_tokens, prefix=head))
        elif what == "ended":
            gone = blocks.ended(*rest)
        elif what == "stored":
            name, each, parent = rest
            gone = store(blocks, name, *each, parent=parent)
        elif what == "removed":
            gone = blocks.removed(*rest)
        else:
            getattr(blocks, what)()
        assert set(gone) <= sent
    blocks.removed(range(13))
    assert len(blocks) == 0


# What an instance publishes.


def a_stream(log: list[Event]) -> tuple[Stream, Dispatcher]:
    """One call has ended on instance `a`, and its blocks 10 to 14 were reported by message 0."""
    brain = dispatcher(instance("a"), record=log.append)
    counter = Counter("kv_events", "", ("instance", "kind"), registry=CollectorRegistry())
    stream = Stream("a", brain, counter)
    call = stage_request("r", num_prompt_tokens=80, prefix=HEAD)
    brain.submit(call, now=0.0)
    stream.blocks.sent(call)
    stream.take(*read(message(0, stored("r", 10, 11, 12, 13, 14))))
    brain.settle(outcome("r", "a", num_prompt_tokens=80))
    stream.blocks.ended("r", 80)
    return stream, brain


def num_cached(brain: Dispatcher) -> int:
    call = stage_request("probe", num_prompt_tokens=80, prefix=HEAD)
    (candidate,) = brain.fleet.candidates(call)
    return candidate.num_cached_tokens


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


# The wire.


def test_events_without_names_of_fields_mean_the_same() -> None:
    event = stored("r", 10, 11)
    values = [event.get(name) for name in ("block_hashes", "parent_block_hash", "token_ids")]
    as_list = [
        "BlockStored",
        *values,
        SIZE,
        None,
        "GPU",
        None,
        None,
        0,
        None,
        None,
        None,
        None,
        "r",
    ]

    ((kind, read_event),) = read(message(7, as_list))[1]

    assert kind == "BlockStored"
    used = ("block_hashes", "parent_block_hash", "block_size", "medium", "group_idx", "session_id")
    assert {name: read_event[name] for name in used} == {name: event[name] for name in used}


def test_events_of_later_versions_are_passed_over() -> None:
    sequence, events = read(message(3, {"type": "BlockMoved", "what": 1}, CLEARED))

    assert (sequence, [kind for kind, _ in events]) == (3, ["AllBlocksCleared"])


plain = st.recursive(
    st.none() | st.integers(-5, 2**40) | st.text(max_size=5) | st.binary(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)
odd_events = st.builds(
    lambda kind, hashes, rest: {"type": kind, "block_hashes": hashes, **rest},
    st.sampled_from(["BlockStored", "BlockRemoved", "AllBlocksCleared"]),
    plain,
    st.dictionaries(
        st.sampled_from(["parent_block_hash", "block_size", "medium", "group_idx", "session_id"]),
        plain,
    ),
)
frames = st.one_of(
    st.lists(st.binary(max_size=20), max_size=4),
    st.lists(odd_events | plain, max_size=3).map(lambda events: message(1, *events)),
    plain.map(lambda batch: [b"", b"\0" * 8, msgspec.msgpack.encode(batch)]),
)


@given(frames)
def test_junk_is_told_apart_and_never_does_more(junk: list[bytes]) -> None:
    stream, _ = a_stream([])
    try:
        stream.take(*read(junk))
    except UnreadableError:
        stream.unreadable()


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


def test_a_block_s_name_is_no_longer_than_vllm_s() -> None:
    assert list(read(message(1, removed(1) | {"block_hashes": [b"x" * 32]}))[1])
    with pytest.raises(UnreadableError):
        list(read(message(1, removed(1) | {"block_hashes": [b"x" * 1_000_000]}))[1])


def test_a_session_of_a_client_s_own_making_makes_no_message_unreadable() -> None:
    for session_id in ("x" * 100_000, 7, [[]] * 100_000):
        ((_, event),) = read(message(1, stored("r", 10) | {"session_id": session_id}))[1]
        assert event["session_id"] is None
        assert event["block_hashes"] == [10]


LISTS = msgspec.Raw(b"\xdd" + (1 << 20).to_bytes(4, "big") + b"\x90" * (1 << 20))
"""A million empty lists, of which Python would make 64 MB."""


@pytest.mark.parametrize(
    "batch",
    [
        LISTS,
        [1.0, LISTS],
        [LISTS, []],
        [1.0, [LISTS] * 3],
        [1.0, [], LISTS],
        [1.0, [removed(1) | {"block_hashes": LISTS}]],
        [1.0, [removed(1) | {"medium": LISTS}]],
        [1.0, [removed(1) | {"later": LISTS}]],
        [1.0, [{"what": LISTS, "type": "BlockMoved"}]],
        [1.0, [["BlockMoved", LISTS]]],
        [1.0, [["BlockStored", [1], None, LISTS, 16]]],
        [1.0, [stored("r", 1) | {"session_id": LISTS}]],
        [1.0, [stored("r", 1) | {"extra_keys": LISTS}]],
        [1.0, [removed(*range(1 << 20))]],
        [1.0, [b"x" * (3 << 20)]],
        [1.0, [CLEARED] * 100_000],
        msgspec.Raw(b"\x91" * (1 << 20)),
    ],
    ids=range(17),
)
def test_of_what_a_message_has_too_much_of_nothing_is_made(batch: Any) -> None:
    stream, _ = a_stream([])
    frames = [b"", b"\0" * 8, msgspec.msgpack.encode(batch)]
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        with suppress(UnreadableError):
            stream.take(*read(frames))
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert most - before < 2 * len(frames[2])


async def test_while_a_long_message_is_taken_others_get_their_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kv_wire, "_AT_ONCE_S", 0.0)
    stream, brain = a_stream([])
    taking = asyncio.create_task(_take(stream, message(1, *[removed(99)] * 50, removed(13))))
    num_turns = 0
    while not taking.done():
        await asyncio.sleep(0)
        num_turns += 1

    assert num_turns > 50
    assert num_cached(brain) == 32


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
