"""The server under load, as the load generator sees it: what it is, and how it fares."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from string import ascii_lowercase
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from vllm_workflow.bench.prompts import Prompts
from vllm_workflow.core.errors import ConfigError, UpstreamError

_RETRY_S = 0.25
_TIMEOUT = aiohttp.ClientTimeout(total=10)
_EMULATED = "vllm_workflow:emulated_busy_seconds_total"
_EMULATED_INFO = "vllm_workflow:emulated_gpu_info"
_FINGERPRINT_LABELS = ("policy_fingerprint", "fingerprint", "policy")


class Target:
    """Speaks to one OpenAI-compatible server, apart from the load itself.

    Args:
        base_url: Root of the server, with or without `/v1`.
        session: Carries the requests.

    Raises:
        ConfigError: No usable URL.
    """

    def __init__(self, base_url: str, session: aiohttp.ClientSession) -> None:
        self.root = server_root(base_url)
        self._session = session

    async def wait_ready(self, timeout_s: float) -> None:
        """Wait until the server lists a model; not at all if `timeout_s` is 0.

        Raises:
            UpstreamError: It did not in time.
        """
        give_up = time.monotonic() + timeout_s
        while timeout_s > 0:
            try:
                await self.first_model()
            except UpstreamError as e:
                if time.monotonic() > give_up:
                    raise UpstreamError(f"not ready after {timeout_s:g} s: {e}") from e
                await asyncio.sleep(_RETRY_S)
            else:
                return

    async def first_model(self) -> str:
        """Return the first model that the server lists.

        Raises:
            UpstreamError: It lists none.
        """
        cards = _object(await self._text("/v1/models")).get("data") or []
        if not cards or not isinstance(cards[0], dict) or not cards[0].get("id"):
            raise UpstreamError(f"{self.root}/v1/models: expected a model, got {cards!r:.200}")
        return str(cards[0]["id"])

    async def prompts(self, model: str, salt: str) -> Prompts:
        """Return prompts of tokens that the server itself uses.

        Raises:
            UpstreamError: It cannot tokenise.
        """
        text = " ".join(a + b for a in ascii_lowercase for b in ascii_lowercase)
        body = {"model": model, "prompt": text, "add_special_tokens": False}
        try:
            async with self._session.post(
                f"{self.root}/tokenize", json=body, timeout=_TIMEOUT
            ) as response:
                status = response.status
                ids = _object(await response.text()).get("tokens") or []
        except (aiohttp.ClientError, TimeoutError) as e:
            raise UpstreamError(f"{self.root}/tokenize: {type(e).__name__}: {e}") from e
        try:
            return Prompts(sorted(set(ids)), salt)
        except (ConfigError, TypeError) as e:
            raise UpstreamError(
                f"{self.root}/tokenize: expected token ids, got {str(ids)[:80]} with status "
                f"{status}; a router has no such path: give the size of the model's vocabulary "
                "instead, e.g. --vocab-size 128000"
            ) from e

    async def facts(self) -> dict[str, Any]:
        """Return what the server says of itself, as far as it does: version, policy."""
        facts: dict[str, Any] = {}
        version = _object(await self._maybe("/version")).get("version")
        if version is not None:
            facts["server_version"] = str(version)
        health = _object(await self._maybe("/health"))
        facts |= {k: health[k] for k in ("policy", *_FINGERPRINT_LABELS) if k in health}
        if "instances" in health:
            facts["instances"] = health["instances"]
        facts |= _labels_of_policy(await self._maybe("/metrics"))
        return facts

    async def metrics(self) -> str:
        """Return the text of `/metrics`.

        Raises:
            UpstreamError: It is not there.
        """
        return await self._text("/metrics")

    async def emulation_metrics(self) -> str:
        """Return the text of `/metrics` of a server with an emulated GPU.

        Raises:
            UpstreamError: It has none.
        """
        text = await self.metrics()
        if _EMULATED not in text:
            raise UpstreamError(
                f"{self.root}/metrics: expected {_EMULATED}…, got none: no emulated GPU"
            )
        return text

    async def _maybe(self, path: str) -> str:
        try:
            return await self._text(path)
        except UpstreamError:
            return ""

    async def _text(self, path: str) -> str:
        url = self.root + path
        try:
            async with self._session.get(url, timeout=_TIMEOUT) as response:
                if response.status != 200:
                    raise UpstreamError(f"{url}: expected status 200, got {response.status}")
                return await response.text(errors="replace")
        except (aiohttp.ClientError, TimeoutError) as e:
            raise UpstreamError(f"{url}: {type(e).__name__}: {e}") from e


def emulated_gpu(metrics: str) -> dict[str, str]:
    """Return what a server says of the GPU that it emulates, empty for nothing."""
    for family in text_string_to_metric_families(metrics):
        if family.name == _EMULATED_INFO and family.samples:
            return {k: v for k, v in family.samples[0].labels.items() if v}
    return {}


def server_root(base_url: str) -> str:
    """Return a URL without `/v1` and slash at its end.

    Raises:
        ConfigError: Not `http://HOST:PORT`.
    """
    parts = urlsplit(base_url)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ConfigError(f"base URL: expected http://HOST:PORT, got {base_url!r}")
    return base_url.rstrip("/").removesuffix("/v1")


def _object(text: str) -> Mapping[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _labels_of_policy(metrics: str) -> dict[str, str]:
    """Return the first policy fingerprint among the labels of `vllm_workflow:` series."""
    try:
        families = list(text_string_to_metric_families(metrics))
    except ValueError:
        return {}
    for family in families:
        if family.name.startswith("vllm_workflow:"):
            for sample in family.samples:
                found = {k: sample.labels[k] for k in _FINGERPRINT_LABELS if k in sample.labels}
                if found:
                    return found
    return {}
