"""A vLLM server as the prober sees it: what it says of itself, and timed completions."""

from __future__ import annotations

import json
import re
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from string import ascii_lowercase
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from vllm_workflow.core.errors import ConfigError, UpstreamError
from vllm_workflow.core.windows import RequestTiming

_METRIC = re.compile(r"^(?P<name>[\w:]+)(?:\{(?P<labels>.*)\})?\s+(?P<value>\S+)")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
_LEAST_VOCABULARY = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerFacts:
    """What a server says of itself."""

    model: str
    max_model_len: int
    version: str
    num_kv_blocks: int | None
    block_size: int | None
    num_requests: int
    """Running or waiting."""


@dataclass(frozen=True, slots=True)
class TimedCall:
    """One completion; instants on this process's monotonic clock."""

    sent_time: float
    timing: RequestTiming


class Server:
    """Speaks to one server.

    Args:
        base_url: Root of the server, with or without `/v1`.
        session: Carries the requests.
        model: Its name at the server; the first one that the server lists if empty.
    """

    def __init__(self, base_url: str, session: aiohttp.ClientSession, model: str = "") -> None:
        self.root = _root(base_url)
        self.model = model
        self._session = session

    async def facts(self) -> ServerFacts:
        """Ask the server for its model and its memory.

        Raises:
            UpstreamError: It does not answer, or not as a vLLM server does.
        """
        listed = (await self._json("GET", "/v1/models")).get("data") or []
        cards = [c for c in listed if not self.model or c.get("id") == self.model]
        if not cards or not isinstance(cards[0].get("max_model_len"), int):
            raise UpstreamError(
                f"{self.root}/v1/models: expected model {self.model or 'of any name'!r} with "
                f"max_model_len, got {listed!r:.300}"
            )
        self.model = str(cards[0]["id"])
        num_blocks, block_size, num_requests = _read_metrics(await self._text("/metrics"))
        version = (await self._json("GET", "/version")).get("version", "")
        return ServerFacts(
            model=self.model,
            max_model_len=cards[0]["max_model_len"],
            version=str(version),
            num_kv_blocks=num_blocks,
            block_size=block_size,
            num_requests=num_requests,
        )

    async def vocabulary(self) -> list[int]:
        """Return some valid token ids: random prompts of them share no prefix.

        Raises:
            UpstreamError: The server cannot tokenise.
        """
        text = " ".join(a + b for a in ascii_lowercase for b in ascii_lowercase)
        body = {"model": self.model, "prompt": text, "add_special_tokens": False}
        ids = sorted(set((await self._json("POST", "/tokenize", body)).get("tokens") or ()))
        if len(ids) < _LEAST_VOCABULARY:
            raise UpstreamError(
                f"{self.root}/tokenize: expected {_LEAST_VOCABULARY} different tokens, got {ids}"
            )
        return ids

    async def complete(
        self,
        prompt: Sequence[int],
        num_output_tokens: int,
        on_first_token: Callable[[], None] | None = None,
    ) -> TimedCall:
        """Stream exactly `num_output_tokens` and take the times of the first and the last.

        Raises:
            UpstreamError: The server fails, or stops early.
        """
        body = self._exactly(prompt, num_output_tokens)
        times: list[float] = []
        usage: dict[str, Any] = {}
        sent_time = time.monotonic()
        async with self._asked("POST", "/v1/completions", body) as response:
            async for line in response.content:
                now = time.monotonic()
                event = self._event(line)
                if event.get("choices"):
                    times.append(now)
                    if len(times) == 1 and on_first_token:
                        on_first_token()
                usage = event.get("usage") or usage
        if not times or usage.get("completion_tokens") != num_output_tokens:
            raise UpstreamError(
                f"{self.root}/v1/completions: expected {num_output_tokens} tokens and a usage "
                f"that says so, got {len(times)} events and usage {usage!r}"
            )
        details = usage.get("prompt_tokens_details") or {}
        timing = RequestTiming(
            first_token_time=times[0],
            last_token_time=times[-1],
            num_prompt_tokens=usage.get("prompt_tokens", len(prompt)),
            num_output_tokens=num_output_tokens,
            num_cached_tokens=details.get("cached_tokens") or 0,
        )
        return TimedCall(sent_time, timing)

    def _exactly(self, prompt: Sequence[int], num_output_tokens: int) -> dict[str, Any]:
        return {
            "model": self.model,
            "prompt": list(prompt),
            "max_tokens": num_output_tokens,
            "min_tokens": num_output_tokens,
            "ignore_eos": True,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }

    def _event(self, line: bytes) -> dict[str, Any]:
        data = line.removeprefix(b"data:").strip()
        if not line.startswith(b"data:") or data == b"[DONE]":
            return {}
        event = self._parsed(data, "/v1/completions")
        if "error" in event:
            raise UpstreamError(f"{self.root}/v1/completions: {event['error']!r:.300}")
        return event

    async def _json(self, method: str, path: str, body: object = None) -> dict[str, Any]:
        async with self._asked(method, path, body) as response:
            return self._parsed(await response.read(), path)

    async def _text(self, path: str) -> str:
        async with self._asked("GET", path) as response:
            return (await response.read()).decode(errors="replace")

    def _parsed(self, data: bytes, path: str) -> dict[str, Any]:
        try:
            parsed = json.loads(data)
        except ValueError:
            parsed = None
        if not isinstance(parsed, dict):
            raise UpstreamError(f"{self.root}{path}: expected a JSON object, got {data!r:.200}")
        return parsed

    @asynccontextmanager
    async def _asked(
        self, method: str, path: str, body: object = None
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        url = self.root + path
        try:
            async with self._session.request(method, url, json=body) as response:
                if response.status != 200:
                    text = (await response.text(errors="replace")).strip()
                    raise UpstreamError(f"{url}: expected status 200, got {response.status} {text}")
                yield response
        except (aiohttp.ClientError, TimeoutError, ValueError) as e:
            raise UpstreamError(f"{url}: {type(e).__name__}: {e}") from e


def _root(base_url: str) -> str:
    parts = urlsplit(base_url)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ConfigError(f"base_url: expected http://HOST:PORT, got {base_url!r}")
    return base_url.rstrip("/").removesuffix("/v1")


def _read_metrics(text: str) -> tuple[int | None, int | None, int]:
    """Return KV blocks, tokens per block, and requests that run or wait."""
    num_blocks = block_size = None
    num_requests = 0.0
    for match in filter(None, map(_METRIC.match, text.splitlines())):
        name = match["name"]
        if name == "vllm:cache_config_info":
            labels = dict(_LABEL.findall(match["labels"] or ""))
            num_blocks = _count(labels.get("num_gpu_blocks"))
            block_size = _count(labels.get("block_size"))
        elif name in {"vllm:num_requests_running", "vllm:num_requests_waiting"}:
            num_requests += float(match["value"])
    return num_blocks, block_size, int(num_requests)


def _count(text: str | None) -> int | None:
    return int(text) if text and text.isdecimal() and int(text) > 0 else None
