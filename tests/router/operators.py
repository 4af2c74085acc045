"""Somebody with the operators' key, and a router that is run from a file."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

from tests.fakes import FakeEngine
from tests.router.conftest import Client
from vllm_workflow.router.app import serve
from vllm_workflow.router.config import RouterConfig
from vllm_workflow.router.credentials import KeyHash, new_key

KEY = new_key()
ADMIN = {"port": 0, "key_hash": str(KeyHash.of(KEY))}


class Operator:
    """Somebody with the operators' key."""

    def __init__(self, client: Client, key: str = KEY) -> None:
        self._client = client
        self._key = key

    async def ask(self, method: str, path: str, data: Any = None) -> tuple[int, dict[str, Any]]:
        async with self._client.session.request(
            method,
            self._client.router.admin_url + path,
            data=None if data is None else json.dumps(data),
            headers={"Authorization": f"Bearer {self._key}"},
        ) as response:
            return response.status, await response.json()

    async def instances(self) -> dict[str, str]:
        """Each instance's state."""
        _, status = await self.ask("GET", "/admin/status")
        return {instance["id"]: instance["state"] for instance in status["instances"]}

    async def until(self, states: dict[str, str]) -> None:
        async with asyncio.timeout(10):
            while await self.instances() != states:
                await asyncio.sleep(0.02)


@asynccontextmanager
async def from_file(path: Path, text: str) -> AsyncIterator[tuple[Client, Callable[[str], None]]]:
    """Run a router from a file; yields what writes the file anew, too."""

    def write(text: str) -> None:
        path.write_text(text, "utf-8")

    def read() -> RouterConfig:
        return RouterConfig.from_file(path)

    write(text)
    async with (
        asyncio.timeout(60),
        serve(read(), read) as router,
        aiohttp.ClientSession() as session,
    ):
        yield Client(router, session), write


def text_of(*engines: FakeEngine, extra: str = "") -> str:
    instances = ", ".join(f"{{id: {'ab'[i]}, url: '{e.url}'}}" for i, e in enumerate(engines))
    return (
        f"port: 0\nshutdown_grace_s: 0.5\nadmin: {{port: 0, key_hash: '{ADMIN['key_hash']}'}}\n"
        f"instances: [{instances}]\n{extra}"
    )


async def changed(client: Client) -> set[str]:
    """Reload; returns the names of the fields that changed."""
    status, answer = await Operator(client).ask("POST", "/admin/reload")
    assert status == 200, answer
    return set(answer["changed"])
