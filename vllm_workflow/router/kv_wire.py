"""vLLM's KV-cache events as they come: a ZeroMQ socket, and msgpack that anybody may have written.

`vllm/distributed/kv_events.py` is the other end: a PUB socket whose messages have a topic, a
sequence number of 8 bytes, and a batch of events. Imported where an instance has `kv_events` only.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from vllm_workflow.router.kv_blocks import BlockHash
from vllm_workflow.router.kv_events import Event, Stream

_MAX_MESSAGE_BYTES = 16 << 20
_MAX_HASH_BYTES = 64
"""vLLM's have 32; they are kept, by the million."""
_HEARTBEAT_MS = 10_000
"""A publisher whose host is gone is connected to again when it was silent for twice as long."""
_RECONNECT_MS = 200
_MAX_RECONNECT_MS = 5_000
_FIELDS: dict[str, tuple[str, ...]] = {
    "BlockStored": (
        *("block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id", "medium"),
        *("lora_name", "extra_keys", "group_idx", "kv_cache_spec_kind"),
        *("kv_cache_spec_sliding_window", "locality", "ownership", "session_id"),
    ),
    "BlockRemoved": ("block_hashes", "medium", "group_idx", "locality", "ownership"),
    "AllBlocksCleared": (),
}
"""In the order in which earlier versions of vLLM write them, as lists without names."""
_logger = logging.getLogger(__name__)


class UnreadableError(ValueError):
    """A message is not what vLLM publishes."""


@asynccontextmanager
async def connecting() -> AsyncIterator[zmq.asyncio.Context]:
    """Yield what makes sockets, and close them in the end."""
    context = zmq.asyncio.Context()
    try:
        yield context
    finally:
        context.destroy(linger=0)


async def follow(context: zmq.asyncio.Context, endpoint: str, stream: Stream) -> None:
    """Read what is published until cancelled. Whatever comes or does not, the router goes on.

    A publisher that is not there, or goes away, is connected to when it is back.
    """
    is_told = False
    while True:
        try:
            await _follow(context, endpoint, stream)
        except zmq.ZMQError as e:  # no such address, or no file descriptors left
            if not is_told:
                _logger.error("kv_events %s: %s", endpoint, e)
            is_told = True
            stream.unreadable()
            await asyncio.sleep(_MAX_RECONNECT_MS / 1000.0)


async def _follow(context: zmq.asyncio.Context, endpoint: str, stream: Stream) -> None:
    socket = context.socket(zmq.SUB)
    is_understood = True
    try:
        for option, value in (
            (zmq.LINGER, 0),
            (zmq.MAXMSGSIZE, _MAX_MESSAGE_BYTES),
            (zmq.RECONNECT_IVL, _RECONNECT_MS),
            (zmq.RECONNECT_IVL_MAX, _MAX_RECONNECT_MS),
            (zmq.HEARTBEAT_IVL, _HEARTBEAT_MS),
            (zmq.HEARTBEAT_TIMEOUT, 2 * _HEARTBEAT_MS),
        ):
            socket.setsockopt(option, value)
        socket.subscribe(b"")
        socket.connect(endpoint)
        while True:
            frames = await socket.recv_multipart()
            try:
                stream.take(*read(frames))
                is_understood = True
            except UnreadableError as e:
                stream.unreadable()
                if is_understood:
                    _logger.warning("kv_events %s: %s", endpoint, e)
                is_understood = False
            await asyncio.sleep(0)  # however many have come, others get their turn
    finally:
        socket.close()


def read(frames: Sequence[bytes]) -> tuple[int, list[Event]]:
    """Return sequence number and events of a message.

    Raises:
        UnreadableError: It is not what vLLM publishes.
    """
    if len(frames) != 3 or len(frames[1]) != 8:
        sizes = [len(frame) for frame in frames[:4]]
        raise UnreadableError(f"expected topic, sequence number and batch, got frames of {sizes}")
    try:
        batch = msgspec.msgpack.decode(frames[2])
    except (ValueError, RecursionError) as e:
        raise UnreadableError(f"expected msgpack, got an error: {e}") from None
    if not (isinstance(batch, list) and len(batch) > 1 and isinstance(batch[1], list)):
        raise UnreadableError(f"expected a batch of events, got {batch!r:.80}")
    return int.from_bytes(frames[1], "big"), list(_events(batch[1]))


def _events(events: list[Any]) -> Iterator[Event]:
    """Yield those that are known; later versions may have others.

    Raises:
        UnreadableError: One of them is not what its kind says.
    """
    for event in events:
        if isinstance(event, list) and event and isinstance(event[0], str):
            kind, values = event[0], dict(zip(_FIELDS.get(event[0], ()), event[1:]))
        elif isinstance(event, dict) and isinstance(event.get("type"), str):
            kind, values = event["type"], event
        else:
            raise UnreadableError(f"expected an event, got {event!r:.80}")
        if kind not in _FIELDS:
            continue
        if kind != "AllBlocksCleared" and not _is_sound(kind, values):
            raise UnreadableError(f"expected the fields of {kind}, got {values!r:.200}")
        yield kind, values


def _is_sound(kind: str, event: dict[str, Any]) -> bool:
    hashes = event.get("block_hashes")
    if not (isinstance(hashes, list) and all(map(_is_hash, hashes))):
        return False
    if kind == "BlockRemoved":
        return True
    parent, size = event.get("parent_block_hash"), event.get("block_size")
    return (parent is None or _is_hash(parent)) and type(size) is int and size > 0


def _is_hash(value: object) -> bool:
    return isinstance(value, BlockHash) and (
        isinstance(value, int) or len(value) <= _MAX_HASH_BYTES
    )
