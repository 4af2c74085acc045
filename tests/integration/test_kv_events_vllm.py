"""A router that reads the KV-cache events of a real vLLM server with a small cache.

On an emulated GPU, since what counts here is what is cached, not what is computed.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest

from tests.integration.vllm_process import VllmServer, free_port, serving
from vllm_workflow.emulation.model_dir import write_model_dir
from vllm_workflow.profiles import catalogue
from vllm_workflow.router.app import Router, serve
from vllm_workflow.router.config import RouterConfig

pytestmark = pytest.mark.anyio

BLOCK_SIZE = 16
NUM_BLOCKS = 1100
"""Two of the prompts below, and a little."""
NUM_LETTERS = 7_000
"""Of a prompt, one token each."""
NUM_PIECES = NUM_LETTERS // 2048
"""That a router tells apart."""


@pytest.fixture(scope="module")
def vllm_server(
    tmp_path_factory: pytest.TempPathFactory, development: None
) -> Iterator[tuple[VllmServer, str]]:
    model = tmp_path_factory.mktemp("emulated") / "model"
    write_model_dir(catalogue.shape("llama-3.1-8b"), model)
    endpoint = f"tcp://127.0.0.1:{free_port() + 1}"
    events = {
        "enable_kv_cache_events": True,
        "publisher": "zmq",
        "endpoint": endpoint.replace("127.0.0.1", "*"),
    }
    flags = (
        *("--emulate-gpu", "A100-80G", "--emulate-model-shape", "llama-3.1-8b"),
        *("--emulate-time-scale", "20", "--enable-prefix-caching"),
        *("--block-size", str(BLOCK_SIZE)),
        *("--num-gpu-blocks-override", str(NUM_BLOCKS)),
        *("--kv-events-config", json.dumps(events)),
    )
    log_path = tmp_path_factory.mktemp("vllm") / "server.log"
    with serving(model, log_path, flags) as server:
        yield server, endpoint


@pytest.fixture(scope="module")
def development() -> Iterator[None]:
    """`POST /reset_prefix_cache` is there in development mode only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_SERVER_DEV_MODE", "1")
        yield


class Calls:
    """Prompts of one letter each, and what the router believes of them."""

    def __init__(self, vllm: VllmServer, router: Router, session: aiohttp.ClientSession) -> None:
        self._vllm = vllm
        self._router = router
        self._session = session

    async def make(self, letter: str) -> None:
        body = {"model": "tiny", "prompt": letter * NUM_LETTERS, "max_tokens": 2}
        headers = {"X-Session-ID": "the-run"}  # as the client library says
        url = self._router.url + "/v1/completions"
        async with asyncio.timeout(240):
            while await self._status(url, body, headers) == 503:
                await asyncio.sleep(0.2)  # a busy machine looks like a server that hangs
        await self.until(lambda: self._router.dispatcher.num_in_flight == 0)

    async def _status(self, url: str, body: dict[str, Any], headers: dict[str, str]) -> int:
        async with self._session.post(url, json=body, headers=headers) as response:
            text = await response.text()
            assert response.status in {200, 503}, text
            return int(response.status)

    async def reset(self) -> None:
        url = f"{self._vllm.base_url}/reset_prefix_cache"
        async with self._session.post(url) as response:
            assert response.status == 200

    def num_believed(self) -> int:
        """Pieces of prompts that the router believes to be cached."""
        return len(self._router.dispatcher.fleet._accounts["a"].kv)

    def num_events(self, kind: str) -> float:
        value = self._router.metrics.registry.get_sample_value(
            "vllm_workflow:router_kv_events_total", {"instance": "a", "kind": kind}
        )
        return value or 0.0

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(120):
            while not holds():
                await asyncio.sleep(0.02)

    async def begin(self) -> None:
        """Make calls until events come, some time after the subscription; then forget them."""
        while not self.num_events("BlockStored"):
            await self.make("0")
        await self.reset()
        await self.make("1")  # events are published with the next step
        await self.until(lambda: self.num_events("AllBlocksCleared") == 1)


@asynccontextmanager
async def routing(server: tuple[VllmServer, str]) -> AsyncIterator[Calls]:
    """A router that believes the cache to be endless."""
    vllm, endpoint = server
    instance = {"id": "a", "url": vllm.base_url, "kv_events": endpoint, "num_kv_tokens": 10**9}
    config = RouterConfig.from_mapping({"port": 0, "instances": [instance]}, source="test")
    async with serve(config) as router, aiohttp.ClientSession() as session:
        calls = Calls(vllm, router, session)
        await calls.begin()
        yield calls


async def test_what_the_engine_evicts_is_not_believed_to_be_cached(
    vllm_server: tuple[VllmServer, str],
) -> None:
    async with routing(vllm_server) as calls:
        for letter in "abcd":
            await calls.make(letter)
        assert calls.num_events("BlockRemoved") > 0

        await calls.until(lambda: calls.num_believed() <= NUM_BLOCKS * BLOCK_SIZE // 2048)
        assert calls.num_believed() >= NUM_PIECES


async def test_a_cache_that_was_reset_is_believed_to_be_empty(
    vllm_server: tuple[VllmServer, str],
) -> None:
    async with routing(vllm_server) as calls:
        await calls.make("x")
        assert calls.num_believed() == 2 * NUM_PIECES
        await calls.reset()
        await calls.make("y")

        await calls.until(lambda: calls.num_believed() == NUM_PIECES)
