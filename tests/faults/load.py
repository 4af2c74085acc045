"""Runs of several calls each, and what became of every one of them."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp

CHAT = "/v1/chat/completions"
MAX_TRIES = 4
"""Of a client that tries again what it was told has failed."""
_FIRST_PAUSE_S = 0.25


class Truncated(Exception):
    """An answer that looks whole and is not."""


@dataclass(kw_only=True)
class Tally:
    """What became of calls, as their clients see it."""

    num_runs: int = 0
    num_lost_runs: int = 0
    """A call of theirs could not be made in `MAX_TRIES`."""
    num_truncated: int = 0
    signalled: list[str] = field(default_factory=list)
    """Calls that were told, in the middle of their stream, that it broke off."""
    num_timeouts: int = 0
    """Calls that were given up by a client with less patience than the router."""
    statuses: Counter[int] = field(default_factory=Counter)
    latencies: list[float] = field(default_factory=list)
    """Seconds of calls that ended well, by end."""
    served_by: Counter[str] = field(default_factory=Counter)


@dataclass(kw_only=True)
class Load:
    """Somebody who makes runs of calls, half of them streams, through a router.

    Args:
        url: Of the router.
        num_calls: One after the other, of each run.
        num_tokens: Of each answer.
    """

    url: str
    num_calls: int = 3
    num_tokens: int = 10
    model: str = "m"
    path: str = CHAT
    timeout_s: float | None = None
    """Of a call; a run whose call takes longer is lost."""
    budget_s: float | None = 60.0
    tally: Tally = field(default_factory=Tally)

    async def runs(self, num_runs: int, prefix: str = "run", *, mode: str = "both") -> Tally:
        """Make so many runs at once; returns when all have ended.

        Args:
            num_runs: Side by side.
            prefix: Of their names.
            mode: `stream`, `whole`, or `both`.
        """
        connector = aiohttp.TCPConnector(limit=0)
        timeout = aiohttp.ClientTimeout(total=self.timeout_s)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            names = (f"{prefix}-{i}" for i in range(num_runs))
            # Two and two: a router that takes turns would send all streams to one of two.
            streams = (mode == "stream" or (mode == "both" and i % 4 < 2) for i in range(num_runs))
            await asyncio.gather(
                *(self._run(session, name, stream) for name, stream in zip(names, streams))
            )
        return self.tally

    async def _run(self, session: aiohttp.ClientSession, name: str, stream: bool) -> None:
        self.tally.num_runs += 1
        end = time.monotonic() + (self.budget_s or 0.0)
        for i in range(self.num_calls):
            for attempt in range(MAX_TRIES):
                request_id = f"{name}.{i}.{attempt}"
                headers = {"X-Request-Id": request_id, "X-Workflow-Id": name}
                if self.budget_s is not None:
                    left_ms = 1000.0 * max(0.0, end - time.monotonic())
                    headers["X-Workflow-Budget-Ms"] = f"{left_ms:.0f}"
                if await self._call(session, request_id, headers, stream):
                    break
                await asyncio.sleep(_FIRST_PAUSE_S * 2**attempt)
            else:
                self.tally.num_lost_runs += 1
                return

    async def _call(
        self, session: aiohttp.ClientSession, request_id: str, headers: dict[str, str], stream: bool
    ) -> bool:
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": self.num_tokens,
            "stream": stream,
            "ignore_eos": True,
        }
        if self.path == CHAT:
            body["messages"] = [{"role": "user", "content": request_id}]
        else:
            body["prompt"] = request_id
        if stream:
            body["stream_options"] = {"include_usage": True}
        begin = time.monotonic()
        try:
            async with session.post(self.url + self.path, json=body, headers=headers) as response:
                self.tally.statuses[response.status] += 1
                if response.status != 200:
                    await response.read()
                    return False
                await (read_stream if stream else read_whole)(response, self.num_tokens)
                served_by = response.headers.get("X-Workflow-Instance", "")
        except Truncated:
            self.tally.num_truncated += 1
            return False
        except TimeoutError:
            self.tally.num_timeouts += 1
            return False
        except (aiohttp.ClientError, OSError):
            self.tally.signalled.append(request_id)
            return False
        self.tally.latencies.append(time.monotonic() - begin)
        self.tally.served_by[served_by] += 1
        return True


async def read_whole(response: aiohttp.ClientResponse, num_tokens: int) -> None:
    """Read an answer.

    Raises:
        Truncated: It came to its end without error, but is not complete.
        ClientError: It broke off, and the client can tell.
    """
    try:
        usage = json.loads(await response.read())["usage"]
    except (ValueError, KeyError, TypeError):
        raise Truncated from None
    if usage["completion_tokens"] != num_tokens:
        raise Truncated


async def read_stream(response: aiohttp.ClientResponse, num_tokens: int) -> None:
    """Read a stream as OpenAI's SDKs do: it ends with `[DONE]` or its connection.

    Raises:
        Truncated: As above.
        ClientError: As above; an error event counts as one.
    """
    usage: dict[str, int] = {}
    async for line in response.content:
        data = line.removeprefix(b"data: ").strip()
        if not data:
            continue
        if data == b"[DONE]":
            break
        try:
            members = json.loads(data)
        except ValueError:
            continue  # half an event
        if "error" in members:
            raise aiohttp.ClientPayloadError("error event")
        usage = members.get("usage") or usage
    if usage.get("completion_tokens") != num_tokens:
        raise Truncated
    await response.read()


@asynccontextmanager
async def running(load: Load, num_runs: int, **how: Any) -> AsyncIterator[Load]:
    """Make runs beside the block, and await their end after it."""
    task = asyncio.create_task(load.runs(num_runs, **how))
    try:
        yield load
        await task
    finally:
        task.cancel()
