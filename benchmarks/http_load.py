"""Load for a router in front of servers that answer at once, and what the router spends on it."""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass

import aiohttp
import psutil

from vllm_workflow.core.errors import UpstreamError

NUM_RUNS = 50
"""Runs, sessions or Programs that calls belong to, in turn."""
_WORDS = "select name from customers where city is unknown "
PROMPT_BYTES = 2_000


def prompt(num_bytes: int) -> str:
    return (_WORDS * (num_bytes // len(_WORDS) + 1))[:num_bytes]


PROMPT = prompt(PROMPT_BYTES)


@dataclass(frozen=True, kw_only=True)
class Spent:
    """What some requests took."""

    latencies_s: list[float]
    """To the end of the answer, of each."""
    cpu_s: float
    """Of the router's processes, for all."""
    wall_s: float

    @property
    def cpu_us(self) -> float:
        """Router CPU per request."""
        return 1e6 * self.cpu_s / len(self.latencies_s)

    @property
    def p50_ms(self) -> float:
        return 1e3 * statistics.median(self.latencies_s)

    @property
    def cores(self) -> float:
        return self.cpu_s / self.wall_s


class Load:
    """Sends chat completions to one URL.

    Args:
        url: Root of a router.
        pid: Its process, or the parent of it.
        identity: `headers` as this project's client sends, `session` as other routers take.
        prompt: Of each request.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        url: str,
        pid: int,
        identity: str,
        prompt: str = PROMPT,
    ) -> None:
        self._session = session
        self._url = f"{url}/v1/chat/completions"
        self._pid = pid
        self._identity = identity
        self._prompt = prompt
        self._numbers = itertools.count()

    async def closed(self, num_requests: int, concurrency: int, *, num_chunks: int = 0) -> Spent:
        """Keep so many requests under way until all are done.

        Args:
            num_requests: In all.
            concurrency: At a time.
            num_chunks: Of each stream; 0: no streams.
        """
        left = iter(range(num_requests))
        latencies_s: list[float] = []

        async def one_after_the_other() -> None:
            for _ in left:
                took_s = await self._call(num_chunks)
                latencies_s.append(took_s)

        cpu_s, begin = self.cpu_s(), time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(one_after_the_other())
        wall_s = time.perf_counter() - begin
        return Spent(latencies_s=latencies_s, cpu_s=self.cpu_s() - cpu_s, wall_s=wall_s)

    async def paced(self, num_streams: int, num_chunks: int, gap_ms: float) -> Spent:
        """Open streams side by side whose chunks come at a pace, as tokens do."""
        cpu_s, begin = self.cpu_s(), time.perf_counter()
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(self._call(num_chunks, gap_ms=gap_ms)) for _ in range(num_streams)
            ]
        wall_s = time.perf_counter() - begin
        latencies_s = [task.result() for task in tasks]
        return Spent(latencies_s=latencies_s, cpu_s=self.cpu_s() - cpu_s, wall_s=wall_s)

    def cpu_s(self) -> float:
        """CPU time of the router's processes until now, user and system."""
        return sum(times.user + times.system for times in self._each("cpu_times"))

    def rss_mb(self) -> float:
        """Resident memory of the router's processes."""
        return sum(memory.rss for memory in self._each("memory_info")) / 2**20

    def _each(self, what: str):  # type: ignore[no-untyped-def]
        parent = psutil.Process(self._pid)
        return [getattr(each, what)() for each in (parent, *parent.children(recursive=True))]

    async def _call(self, num_chunks: int, *, gap_ms: float = 0.0) -> float:
        body: dict[str, object] = {
            "model": "m",
            "messages": [{"role": "user", "content": self._prompt}],
            "max_tokens": num_chunks or 16,
        }
        if num_chunks:
            body["stream"] = True
        begin = time.perf_counter()
        async with self._session.post(
            self._url, json=body, headers=self._headers(gap_ms)
        ) as response:
            answer = await response.read()
        if response.status != 200 or (num_chunks and b"[DONE]" not in answer):
            raise UpstreamError(f"{self._url}: status {response.status}: {answer[-200:]!r}")
        return time.perf_counter() - begin

    def _headers(self, gap_ms: float) -> Mapping[str, str]:
        run = f"run-{next(self._numbers) % NUM_RUNS}"
        headers = {"X-Gap-Ms": str(gap_ms)} if gap_ms else {}
        if self._identity == "session":
            return headers | {"X-Session-ID": run}
        return headers | {
            "X-Workflow-Id": run,
            "X-Workflow-Name": "text2sql",
            "X-Workflow-Stage": "generate",
            "X-Workflow-Slo-Ms": "600000",
        }
