"""The request body: read as little as is needed, changed by splicing.

What a client sent reaches the engine byte for byte, but for the members that are added:
decoding and encoding again would change `1.0`, `1e400`, big integers and repeated keys.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from vllm_workflow.router.dialects import agentic_context
from vllm_workflow.router.errors import RequestError

_DECODER = json.JSONDecoder()
_dumps = json.JSONEncoder(separators=(",", ":")).encode
_BLANKS = " \t\r\n"
_TOKEN_LIMITS = ("max_completion_tokens", "max_tokens", "max_output_tokens")


@dataclass(frozen=True, slots=True)
class Body:
    """A JSON object as it arrived, and its members."""

    raw: bytes
    members: Mapping[str, Any]
    """The last of repeated keys counts, as in every JSON reader of Python."""

    @property
    def model(self) -> str:
        """The model asked for; empty if there is none, which a server of one model allows."""
        return self.members.get("model") or ""

    @property
    def stream(self) -> bool:
        return self.members.get("stream") is True

    @property
    def max_tokens(self) -> int | None:
        """The client's own bound on output tokens."""
        for name in _TOKEN_LIMITS:
            limit = self.members.get(name)
            if type(limit) is int and limit > 0:
                return limit
        return None


def parse(raw: bytes) -> Body:
    """Read a request body.

    Raises:
        RequestError: Not a JSON object in UTF-8, or with a model that is not a string.
    """
    try:
        members = json.loads(raw.decode())
    except UnicodeDecodeError as e:
        raise RequestError(f"body: expected JSON in UTF-8, got {e.reason}") from None
    except RecursionError:
        raise RequestError("body: expected JSON, got one nested too deeply") from None
    except ValueError as e:
        raise RequestError(f"body: expected JSON, got an error: {e}") from None
    if not isinstance(members, dict):
        raise RequestError(f"body: expected a JSON object, got {type(members).__name__}")
    model = members.get("model")
    if not (model is None or isinstance(model, str)):
        raise RequestError(f"model: expected a string, got {model!a:.80}", param="model")
    return Body(raw, members)


def with_additions(
    body: Body, xargs: Mapping[str, str | int], *, priority: int | None = None
) -> bytes:
    """Return the body to forward.

    Args:
        body: As the client sent it.
        xargs: Flat values for `vllm_xargs`. If there are any, the client's own `wf_*` keys
            there go, so that an engine sees one source; other keys stay as they are.
        priority: For a body that has no `priority` of its own.
    """
    raw, additions = body.raw, []
    theirs = body.members.get("vllm_xargs")
    if "vllm_xargs" not in body.members:
        if xargs:
            additions.append(f'"vllm_xargs":{_dumps(xargs)}')
    elif (theirs is None and xargs) or (
        isinstance(theirs, dict) and (xargs or agentic_context(body.members))
    ):
        raw = _replace_xargs(raw.decode(), xargs).encode()
    if priority is not None and "priority" not in body.members:
        additions.append(f'"priority":{priority}')
    if not additions:
        return raw
    end = raw.rindex(b"}")
    comma = b"," if body.members else b""
    return b"".join((raw[:end], comma, ",".join(additions).encode(), raw[end:]))


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
