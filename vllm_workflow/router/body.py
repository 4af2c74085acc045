"""The request body: read as little as is needed, changed by splicing.

What a client sent reaches the engine byte for byte, but for the members that are added:
decoding and encoding again would change `1.0`, `1e400`, big integers and repeated keys.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from vllm_workflow.router.dialects import agentic_context
from vllm_workflow.router.errors import RequestError

MAX_DEPTH = 100
"""Objects and lists within each other; the engine's own reader gives up near 1,000."""
MAX_CONTAINERS = 100_000
"""Objects and lists: two bytes each in a body, some 200 in memory."""
MAX_VALUES = 1_000_000
"""A prompt of token ids has one for each."""
_LOOKED_INTO_BYTES = 1 << 20
"""A smaller body is decoded at once: what it can become is small enough to be counted then."""
_SMALL_BYTES = 4_096
"""What is in so few need not be counted to the last one."""
VALUE_BYTES = 64
"""What a value takes in memory beside its bytes, about."""
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)
# Possessive, and an open string goes to the end: a hostile body takes linear time too.


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no JSON")


_DECODER = json.JSONDecoder(parse_constant=_no_number)
_fast = msgspec.json.Decoder()
_encode = msgspec.json.Encoder().encode
_dumps = json.JSONEncoder(separators=(",", ":")).encode
_BLANKS = " \t\r\n"
_MAX_TOKENS = 1 << 53
"""More would not survive arithmetic with floats."""
_TOKEN_LIMITS = ("max_completion_tokens", "max_tokens", "max_output_tokens")


class Body:
    """A JSON object as it arrived, and its members."""

    __slots__ = ("members", "model", "num_values", "raw", "stream")

    def __init__(self, raw: bytes, members: dict[str, Any], num_values: int) -> None:
        self.raw = raw
        self.members = members
        """The last of repeated keys counts, as in every JSON reader of Python."""
        self.num_values = num_values
        """Values in it, at any depth; at most, in a small body."""
        self.model: str = members.get("model") or ""
        """The model asked for; empty if there is none, which a server of one model allows."""
        self.stream = members.get("stream") is True

    @property
    def max_tokens(self) -> int | None:
        """The client's own bound on output tokens; one beyond all that engines do is cut."""
        for name in _TOKEN_LIMITS:
            limit = self.members.get(name)
            if type(limit) is int and limit > 0:
                return min(limit, _MAX_TOKENS)
        return None


def parse(raw: bytes) -> Body:
    """Read a request body.

    Raises:
        RequestError: Not a JSON object in UTF-8, too deep or with too many values, or with a
            model that is not a string.
    """
    if len(raw) > _LOOKED_INTO_BYTES:
        _look_into(raw)
    try:
        members = _fast.decode(raw)
    except (msgspec.MsgspecError, RecursionError, ValueError):
        members = _decoded(raw)
    if not isinstance(members, dict):
        raise RequestError(f"body: expected a JSON object, got {type(members).__name__}")
    model = members.get("model")
    if not (model is None or isinstance(model, str)):
        raise RequestError(f"model: expected a string, got {model!a:.80}", param="model")
    if len(raw) <= _SMALL_BYTES:
        num_containers = raw.count(b"{") + raw.count(b"[")
        if num_containers <= MAX_DEPTH:  # those in text count, too: there are no more values
            return Body(raw, members, num_containers + raw.count(b","))
    return Body(raw, members, _num_values(members))


def _decoded(raw: bytes) -> Any:
    """Decode what the fast decoder does not, which takes less than Python's, or say why not.

    Raises:
        RequestError: It is no JSON, not in UTF-8, or too deep.
    """
    try:
        return _DECODER.decode(raw.decode())
    except UnicodeDecodeError as e:
        raise RequestError(f"body: expected JSON in UTF-8, got {e.reason}") from None
    except RecursionError:
        raise RequestError("body: expected JSON, got one nested too deeply") from None
    except ValueError as e:
        raise RequestError(f"body: expected JSON, got an error: {e}") from None


def _look_into(raw: bytes) -> None:
    """Bound the values in a body before any is made.

    Raises:
        RequestError: There are too many.
    """
    num_containers, num_commas = raw.count(b"{") + raw.count(b"["), raw.count(b",")
    if num_containers > MAX_CONTAINERS or num_commas >= MAX_VALUES:
        num_strings = (raw.count(b'"') - raw.count(b'\\"')) // 2
        if num_strings <= MAX_CONTAINERS:  # else it takes long, and they are too many anyway
            bare = _STRING.sub(b"", raw)
            num_containers, num_commas = bare.count(b"{") + bare.count(b"["), bare.count(b",")
        _check(num_containers, num_commas)


def _num_values(members: dict[str, Any]) -> int:
    """Count the values at any depth.

    Raises:
        RequestError: There are too many, or they are too deep.
    """
    num_containers = num_values = 0
    level: list[Any] = [members]
    for _ in range(MAX_DEPTH):
        num_containers += len(level)
        num_values += sum(map(len, level))
        level = [
            value
            for container in level
            for value in (container.values() if type(container) is dict else container)
            if type(value) is dict or type(value) is list
        ]
        if not level:
            _check(num_containers, num_values)
            return num_values
    raise RequestError(f"body: expected JSON at most {MAX_DEPTH} deep, got a deeper one")


def _check(num_containers: int, num_values: int) -> None:
    for what, number, most in (
        ("objects and lists", num_containers, MAX_CONTAINERS),
        ("values", num_values, MAX_VALUES),
    ):
        if number > most:
            raise RequestError(f"body: expected at most {most} {what}, got {number}")


def with_additions(
    body: Body,
    xargs: Mapping[str, str | int],
    *,
    priority: int | None = None,
    session_id: str | None = None,
) -> bytes:
    """Return the body to forward.

    Args:
        body: As the client sent it.
        xargs: Flat values for `vllm_xargs`. If there are any, the client's own `wf_*` keys
            there go, so that an engine sees one source; other keys stay as they are.
        priority: For a body that has no `priority` of its own.
        session_id: For a body that has no `session_id`.
    """
    raw, additions = body.raw, []
    theirs = body.members.get("vllm_xargs")
    if "vllm_xargs" not in body.members:
        if xargs:
            additions.append(b'"vllm_xargs":' + _encode(xargs))
    elif (theirs is None and xargs) or (
        isinstance(theirs, dict) and (xargs or agentic_context(body.members))
    ):
        raw = _replace_xargs(raw.decode(), xargs).encode()
    if priority is not None and "priority" not in body.members:
        additions.append(b'"priority":%d' % priority)
    if session_id is not None:
        additions.append(b'"session_id":' + _encode(session_id))
    if not additions:
        return raw
    end = raw.rindex(b"}")
    comma = b"," if body.members else b""
    return b"".join((raw[:end], comma, b",".join(additions), raw[end:]))


def _replace_xargs(text: str, xargs: Mapping[str, str | int]) -> str:
    *_, (start, end) = (
        (start, end) for name, _, start, end in _members(text, 0) if name == "vllm_xargs"
    )
    kept: list[str] = []
    if text[start] == "{":
        for name, name_start, value_start, value_end in _members(text, start):
            if name == "agentic_context" and text[value_start] == "{":
                kept.extend(_flattened(text, value_start))
            elif not (xargs and name.startswith("wf_")):
                kept.append(text[name_start:value_end])
    kept.extend(f"{_dumps(name)}:{_dumps(value)}" for name, value in xargs.items())
    return f"{text[:start]}{{{','.join(kept)}}}{text[end:]}"


def _flattened(text: str, start: int) -> Iterator[str]:
    """Members `agentic_<key>` for the scalars of an object; vLLM rejects anything deeper."""
    for name, _, value_start, value_end in _members(text, start):
        if text[value_start] not in "{[n":
            yield f"{_dumps(f'agentic_{name}')}:{text[value_start:value_end]}"


def _members(text: str, start: int) -> Iterator[tuple[str, int, int, int]]:
    """Walk the object at or after `start`: (name, start of name, start and end of value).

    `text` has been decoded before, so it is known to be well-formed.
    """
    at = _skip(text, _skip(text, start) + 1)
    while text[at] != "}":
        name_start = at
        name, at = _DECODER.raw_decode(text, at)
        value_start = _skip(text, _skip(text, at) + 1)
        _, value_end = _DECODER.raw_decode(text, value_start)
        yield name, name_start, value_start, value_end
        at = _skip(text, value_end)
        if text[at] == ",":
            at = _skip(text, at + 1)


def _skip(text: str, at: int) -> int:
    while text[at] in _BLANKS:
        at += 1
    return at
