"""One instance as an HTTP server: where it is, and what it last said of itself."""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp

from vllm_workflow.router.headers import Headers
from vllm_workflow.router.instance_config import InstanceConfig
from vllm_workflow.router.names import Names
from vllm_workflow.router.pool import Pool
from vllm_workflow.router.reports import Others
from vllm_workflow.router.watch import Silence, WatchClock

POSTED = "operator"
"""Source of what came over the operators' port; no source of discovery is called so."""

_NUM_FAILED = 3
"""Calls in a row at which an instance fails before it, and not the next call, is to blame."""
_CANARY_TIMEOUT_S = 2.0
_MAX_ANSWER_BYTES = 16 << 20
"""Of `/v1/models` and `/metrics`; a server that says more is not listened to."""


class Upstream:
    """One instance as an HTTP server."""

    def __init__(self, config: InstanceConfig, clock: WatchClock, names: Names) -> None:
        self._names = names
        self._pool: Pool | None = None
        self.reconfigure(config)
        self.refuses_key = False
        """Whether it last said so of the key that the router has for it."""
        self.source = ""
        """Who found it; empty if it was configured, `POSTED` if an operator added it."""
        self.overrules: str | None = None
        """Source of what an operator had drained before adding this in its place."""
        self.is_disowned = False
        """Whoever found it is gone."""
        self.leaving = False
        """Gets no more calls, and is forgotten when the last one has ended."""
        self.cards: list[dict[str, Any]] = []
        """What it last said of its models; empty if it never did."""
        self.num_probes_to_models = 0
        self.num_probes_to_report = 0
        self.others = Others()
        """What it has to do for somebody else."""
        self.num_kv_tokens: int | None = None
        """That it says its KV cache holds."""
        self.probe_now = asyncio.Event()
        self.watcher: asyncio.Task[None] | None = None
        self.asking: asyncio.Task[None] | None = None
        """Asks how busy it is; ends by itself."""
        self.silence = Silence(clock)
        """Told by each call when it begins, of its bytes, and when it ends."""
        self.generation = 0
        """How often it has come back."""
        self.num_moves = 0
        """What was asked before one of them says nothing of what is there after it."""
        self.num_failed = 0
        """Calls in a row that it answered with 500, 502 or 504."""
        self.is_stuck = False
        """Its engine gave nothing while its server was well, so that its word does not count."""

    @property
    def stays(self) -> bool:
        """Whether it belongs to somebody, and is not leaving."""
        return not self.leaving and not self.is_disowned

    @property
    def is_posted(self) -> bool:
        """Whether an operator has added it, and it stays."""
        return self.source == POSTED and not self.leaving

    def reconfigure(self, config: InstanceConfig) -> None:
        """Take another configuration, key and certificates among it, for what is sent next."""
        self.ssl = config.ssl
        authorization = config.authorization
        self.own_headers = {"Authorization": authorization} if authorization else {}
        """Headers that replace a client's."""
        self.config = config
        self.url = config.url
        self.close()

    @property
    def pool(self) -> Pool:
        """Connections for calls, as it is configured now."""
        if self._pool is None or self._pool.url != self.url:
            self.close()
            self._pool = Pool(self.url, self.ssl, self._names)
        return self._pool

    def close(self) -> None:
        """End the connections that are kept for calls."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def headers(self, headers: Headers) -> Headers:
        """Return the headers to send for a call that came with `headers`."""
        if not self.own_headers:
            return headers
        result = headers.copy()
        for name, value in self.own_headers.items():
            result.set(name, value)
        return result

    def has_answered(self) -> None:
        """Note that a call was answered well."""
        self.num_failed = 0

    def has_failed(self) -> bool:
        """Note an answer that says that it failed at a call; returns whether it fails at all of
        them, so that this one is not to blame."""
        self.num_failed += 1
        return self.num_failed > _NUM_FAILED

    def model_cards(self) -> list[dict[str, Any]]:
        """Entries of `/v1/models`, made up for configured models it does not tell about."""
        names = self.config.models
        if not names:
            return self.cards
        told = {card.get("id"): card for card in self.cards}
        bare = {"object": "model", "created": 0, "owned_by": "vllm"}
        return [told.get(name, {"id": name, **bare}) for name in names]


async def is_moving(session: aiohttp.ClientSession, upstream: Upstream) -> bool:
    """Have an engine that was stuck make one token, at nobody's risk."""
    cards = upstream.model_cards()
    body = {"model": cards[0]["id"] if cards else None, "prompt": "a", "max_tokens": 1}
    timeout = aiohttp.ClientTimeout(total=_CANARY_TIMEOUT_S)
    url = upstream.url + "/v1/completions"
    try:
        async with session.post(
            url, json=body, timeout=timeout, headers=upstream.own_headers, ssl=upstream.ssl
        ) as response:
            await response.read()
            upstream.is_stuck = response.status >= 500
    except (aiohttp.ClientError, OSError, TimeoutError):
        pass
    return not upstream.is_stuck


async def read_body(response: aiohttp.ClientResponse) -> bytes:
    """Read an answer.

    Raises:
        ValueError: It is too long.
    """
    body = bytearray()
    async for piece in response.content.iter_any():
        body += piece
        if len(body) > _MAX_ANSWER_BYTES:
            raise ValueError(f"expected at most {_MAX_ANSWER_BYTES} bytes, got more")
    return bytes(body)
