"""What is read of vLLM's messages, and what junk and giants among them may cost."""

from __future__ import annotations

import asyncio
import tracemalloc
from contextlib import suppress
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.router.kv_messages import (
    CLEARED,
    SIZE,
    a_stream,
    message,
    num_cached,
    removed,
    stored,
)
from vllm_workflow.router import kv_wire
from vllm_workflow.router.kv_wire import UnreadableError, _take, read

pytestmark = pytest.mark.anyio


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
