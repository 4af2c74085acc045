"""One streamed completion over HTTP, timed."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import aiohttp

_USAGE = re.compile(rb'"usage":\s*\{')
_NO_CHOICE = re.compile(rb'"choices":\s*\[\s*\]')
_ERROR = re.compile(rb'^\{\s*"error"')
_MAX_ERROR_LENGTH = 300
_KEEPALIVE_S = 2.0
"""Less than the 5 s after which vLLM closes an idle connection: a call sent just then is lost."""


@dataclass(slots=True, kw_only=True)
class Answer:
    """What came back for one call; instants as the client's clock gives them."""

    sent_time: float
    end_time: float = 0.0
    token_times: list[float] = field(default_factory=list)
    num_prompt_tokens: int | None = None
    num_output_tokens: int | None = None
    num_cached_tokens: int | None = None
    instance: str = ""
    status: int | None = None
    error: str = ""
    is_complete: bool = False
    """Whether the server said that nothing more comes."""


def new_session(call_timeout_s: float, headers: Mapping[str, str]) -> aiohttp.ClientSession:
    """Return a session that opens as many connections as there are calls at a time."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEPALIVE_S),
        timeout=aiohttp.ClientTimeout(total=call_timeout_s, sock_connect=30),
        headers=dict(headers),
        auto_decompress=True,
        trust_env=False,
    )


async def complete(
    session: aiohttp.ClientSession,
    url: str,
    body: bytes,
    headers: Mapping[str, str],
    clock: Callable[[], float] = time.monotonic,
) -> Answer:
    """Send a call and read its stream to the end; never raises for what the server does.

    Args:
        session: See `new_session`.
        url: Of the completions endpoint.
        body: JSON, with `stream`.
        headers: Of this call.
        clock: Gives instants.
    """
    answer = Answer(sent_time=clock())
    try:
        async with session.post(
            url, data=body, headers={"Content-Type": "application/json", **headers}
        ) as response:
            answer.status = response.status
            answer.instance = response.headers.get("X-Workflow-Instance", "")
            if response.status == 200:
                await _read(response, answer, clock)
            else:
                answer.error = f"status {response.status}: {await response.text(errors='replace')}"
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as e:
        answer.error = f"{type(e).__name__}: {e}".rstrip(": ")
    answer.end_time = clock()
    if not answer.error and not answer.is_complete:
        answer.error = "the stream ended before [DONE]"
    if not answer.error and not answer.token_times:
        answer.error = "the stream had no token"
    answer.error = " ".join(answer.error.split())[:_MAX_ERROR_LENGTH]
    return answer


async def _read(
    response: aiohttp.ClientResponse, answer: Answer, clock: Callable[[], float]
) -> None:
    """Read events, most without parsing them: the generator must not be the bottleneck."""
    rest = b""
    async for data in response.content.iter_any():
        now = clock()
        lines = (rest + data).split(b"\n")
        rest = lines.pop()
        for line in lines:
            if line.startswith(b"data:"):
                _take(line[5:].strip(), answer, now)


def _take(event: bytes, answer: Answer, now: float) -> None:
    if event == b"[DONE]":
        answer.is_complete = True
    elif _ERROR.match(event):
        answer.error = f"in the stream: {event.decode(errors='replace')}"
    else:
        if not _NO_CHOICE.search(event):
            answer.token_times.append(now)
        if _USAGE.search(event):
            usage = _object(json.loads(event), "usage")
            answer.num_prompt_tokens = _number(usage, "prompt_tokens")
            answer.num_output_tokens = _number(usage, "completion_tokens")
            details = _object(usage, "prompt_tokens_details")
            answer.num_cached_tokens = _number(details, "cached_tokens")


def _object(value: Any, key: str) -> Mapping[str, Any]:
    found = value.get(key) if isinstance(value, dict) else None
    return found if isinstance(found, dict) else {}


def _number(values: Mapping[str, Any], key: str) -> int | None:
    value = values.get(key)
    return value if type(value) is int else None
