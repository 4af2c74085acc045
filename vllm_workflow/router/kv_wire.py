"""vLLM's KV-cache events as they come: a ZeroMQ socket, and msgpack that anybody may have written.

`vllm/distributed/kv_events.py` is the other end: a PUB socket whose messages have a topic, a
sequence number of 8 bytes, and a batch of events. Imported where an instance has `kv_events` only.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from functools import reduce
from operator import or_
from typing import Annotated, Any

import zmq
import zmq.asyncio
from msgspec import Meta, Raw, Struct, defstruct
from msgspec.msgpack import Decoder

from vllm_workflow.router.kv_events import Event, Stream

MAX_MESSAGE_BYTES = 4 << 20
"""vLLM's have one step's blocks, with about 100 bytes for each of 16 tokens. To look over so many
bytes takes 20 ms, in which nothing else goes on."""
_MAX_FRAME_BYTES = 16 << 20
"""A publisher of more is left, and connected to again."""
_NUM_FRAMES = 3
_MAX_EVENTS = 1 << 16
"""In one message."""
_MAX_HASHES = 1 << 16
"""In one event: a million tokens in blocks of 16."""
_MAX_HASH_BYTES = 64
"""vLLM's have 32; they are kept, by the hundred thousand."""
_MAX_NAME_BYTES = 1024
_AT_ONCE_S = 0.005
"""Of events; then others get their turn."""
_HEARTBEAT_MS = 10_000
"""A publisher whose host is gone is connected to again when it was silent for twice as long."""
_RECONNECT_MS = 200
_MAX_RECONNECT_MS = 5_000
_Name = Annotated[str, Meta(max_length=_MAX_NAME_BYTES)]
_Hash = int | Annotated[bytes, Meta(max_length=_MAX_HASH_BYTES)]
_Hashes = Annotated[list[_Hash], Meta(max_length=_MAX_HASHES)]
_NOTHING = Raw(b"\xc0")
# Whatever is not looked at, or is anybody's to choose, stays raw: nothing is made of it.
_FIELDS: dict[str, tuple[tuple[Any, ...], ...]] = {
    "BlockStored": (
        ("block_hashes", _Hashes),
        ("parent_block_hash", _Hash | None),
        ("token_ids", Raw),
        ("block_size", Annotated[int, Meta(gt=0)]),
        ("lora_id", Raw, _NOTHING),
        ("medium", _Name | None, None),
        ("lora_name", Raw, _NOTHING),
        ("extra_keys", Raw, _NOTHING),
        ("group_idx", int | None, None),
        *((name, Raw, _NOTHING) for name in ("kv_cache_spec_kind", "kv_cache_spec_sliding_window")),
        *((name, Raw, _NOTHING) for name in ("locality", "ownership", "session_id")),
    ),
    "BlockRemoved": (
        ("block_hashes", _Hashes),
        ("medium", _Name | None, None),
        ("group_idx", int | None, None),
    ),
    "AllBlocksCleared": (),
}
"""In the order in which earlier versions of vLLM write them, as lists without names."""


class _Batch(Struct, array_like=True):
    time: Raw
    events: Annotated[list[Raw], Meta(max_length=_MAX_EVENTS)]


class _Named(Struct):
    """An event, of which the kind alone is read."""

    type: _Name


class _Listed(Struct, array_like=True):
    """The same, without names of fields."""

    type: _Name


def _decoder(*, array_like: bool) -> Decoder[Struct]:
    kinds = [
        defstruct(kind, fields, tag=kind, tag_field="type", array_like=array_like, gc=False)
        for kind, fields in _FIELDS.items()
    ]
    return Decoder(reduce(or_, kinds))


_BATCHES = Decoder(_Batch)
_TEXT = Decoder(str)
_DECODERS: dict[bool, tuple[Decoder[Struct], Decoder[Any]]] = {
    False: (_decoder(array_like=False), Decoder(_Named)),
    True: (_decoder(array_like=True), Decoder(_Listed)),
}
"""Of events and of their kinds, by whether they are lists without names."""
_logger = logging.getLogger(__name__)


class UnreadableError(ValueError):
    """A message is not what vLLM publishes."""

    why = "unreadable"


class TooLargeError(UnreadableError):
    """A message is larger than what vLLM publishes."""

    why = "too_large"


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
            (zmq.MAXMSGSIZE, _MAX_FRAME_BYTES),
            (zmq.RECONNECT_IVL, _RECONNECT_MS),
            (zmq.RECONNECT_IVL_MAX, _MAX_RECONNECT_MS),
            (zmq.HEARTBEAT_IVL, _HEARTBEAT_MS),
            (zmq.HEARTBEAT_TIMEOUT, 2 * _HEARTBEAT_MS),
        ):
            socket.setsockopt(option, value)
        socket.subscribe(b"")
        socket.connect(endpoint)
        while True:
            frames = await _received(socket)
            try:
                await _take(stream, frames)
                is_understood = True
            except UnreadableError as e:
                stream.unreadable(e.why)
                if is_understood:
                    _logger.warning("kv_events %s: %s", endpoint, e)
                is_understood = False
    finally:
        socket.close()


async def _received(socket: zmq.asyncio.Socket) -> list[bytes]:
    """Return the next message; of one in too many frames, the first ones and one more."""
    frames = [await socket.recv()]
    while socket.getsockopt(zmq.RCVMORE):
        frame = await socket.recv()
        if len(frames) <= _NUM_FRAMES:
            frames.append(frame)
        await asyncio.sleep(0)  # however many there are, others get their turn
    return frames


async def _take(stream: Stream, frames: Sequence[bytes]) -> None:
    """Have a message taken piece by piece.

    Raises:
        UnreadableError: It is not what vLLM publishes.
    """
    sequence, events = read(frames)
    stream.follows(sequence)
    num_taken = 1
    while num_taken:
        await asyncio.sleep(0)
        num_taken = stream.more(_for_a_while(events))


def _for_a_while(events: Iterator[Event]) -> Iterator[Event]:
    until = time.monotonic() + _AT_ONCE_S
    for event in events:
        yield event
        if time.monotonic() > until:
            return


def read(frames: Sequence[bytes]) -> tuple[int, Iterator[Event]]:
    """Return sequence number and events of a message. Each event is read when it is asked for.

    Raises:
        TooLargeError: It is larger than what vLLM publishes.
        UnreadableError: It is not what vLLM publishes; by the events, too.
    """
    sizes = [len(frame) for frame in frames[: _NUM_FRAMES + 1]]
    if len(sizes) != _NUM_FRAMES or sizes[1] != 8:
        raise UnreadableError(f"expected topic, sequence number and batch, got frames of {sizes}")
    if sum(sizes) > MAX_MESSAGE_BYTES:
        raise TooLargeError(f"expected at most {MAX_MESSAGE_BYTES} bytes, got {sum(sizes)}")
    try:
        batch = _BATCHES.decode(frames[2])
    except (ValueError, RecursionError) as e:
        raise UnreadableError(f"expected a batch of events in msgpack, got an error: {e}") from None
    return int.from_bytes(frames[1], "big"), _events(batch.events)


def _events(events: Iterable[Raw]) -> Iterator[Event]:
    """Yield those that are known; later versions may have others.

    Raises:
        UnreadableError: One of them is not what its kind says.
    """
    for raw in events:
        first = memoryview(raw)[0]
        whole, kinds = _DECODERS[0x90 <= first < 0xA0 or first in {0xDC, 0xDD}]
        try:
            event = whole.decode(raw)
        except (ValueError, RecursionError) as e:
            if _is_known(raw, kinds):
                raise UnreadableError(f"expected an event, got an error: {e}") from None
            continue
        fields = {name: getattr(event, name) for name in event.__struct_fields__}
        if "session_id" in fields:
            fields["session_id"] = _text(fields["session_id"])
        yield type(event).__name__, fields


def _is_known(raw: Raw, kinds: Decoder[Any]) -> bool:
    """Whether something is an event of a kind that is known here, or none at all."""
    try:
        return kinds.decode(raw).type in _FIELDS
    except (ValueError, RecursionError):
        return True


def _text(raw: Raw) -> str | None:
    """Return a name that clients may choose; None if it is none of the router's."""
    if len(memoryview(raw)) > _MAX_NAME_BYTES:
        return None
    try:
        return _TEXT.decode(raw)
    except ValueError:
        return None
