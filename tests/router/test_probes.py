"""What probes make of instances that answer badly, slowly, or from elsewhere than before."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import aiohttp
import pytest

from tests.fakes import FakeEngine
from tests.router.conftest import Routing
from vllm_workflow.core.config import PRESETS
from vllm_workflow.core.dispatcher import Dispatcher
from vllm_workflow.core.errors import ConfigError
from vllm_workflow.core.fleet import Fleet
from vllm_workflow.router import upstreams as upstreams_module
from vllm_workflow.router.instance_config import InstanceConfig
from vllm_workflow.router.metrics import Metrics
from vllm_workflow.router.upstreams import Upstreams
from vllm_workflow.yaml_config import validated

pytestmark = pytest.mark.anyio


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(15):
        while not holds():
            await asyncio.sleep(0.02)


@pytest.mark.parametrize(
    ("card_bytes", "card_type"),
    [
        (b'{"data": []}', "application/json; charset=hex"),
        (b"[" * 200_000, "application/json"),
        (b'{"data": [' + b"9" * 5000 + b"]}", "application/json"),
        (b"\xff", "application/json"),
        (b" " * (17 << 20), "application/json"),
    ],
    ids=["charset", "deep", "long-number", "no-text", "long"],
)
async def test_no_answer_about_models_ends_the_watch(
    card_bytes: bytes, card_type: str, routing: Routing, caplog: pytest.LogCaptureFixture
) -> None:
    async with FakeEngine().serving() as engine, routing(engine) as client:
        upstreams = client.router.upstreams
        engine.card_bytes, engine.card_type = card_bytes, card_type
        for _ in range(2):
            num_before = engine.num_card_asks
            upstreams.suspect("a")
            await until(lambda num_before=num_before: engine.num_card_asks > num_before)
        async with client.post() as response:
            assert response.status == 200
        assert [card["id"] for card in upstreams["a"].model_cards()] == ["m"]

    assert not [record for record in caplog.records if record.exc_info]


async def test_what_breaks_while_one_instance_is_probed_does_not_end_the_watch(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def broken() -> None:
        raise RuntimeError("broken")

    dispatcher = Dispatcher(Fleet(), PRESETS["workflow"])
    async with FakeEngine().serving() as engine, aiohttp.ClientSession() as session:
        config = InstanceConfig(id="a", url=engine.url)
        upstreams = Upstreams([config], dispatcher, session, Metrics(), broken)
        watching = asyncio.create_task(upstreams.run())
        await until(lambda: dispatcher.fleet.is_healthy("a"))
        engine.health = 500
        upstreams.suspect("a")
        await until(lambda: not dispatcher.fleet.is_healthy("a"))
        assert not watching.done()
        watching.cancel()
        await asyncio.wait([watching])

    assert "instance a could not be probed" in caplog.text


async def test_a_stream_that_flows_is_not_cut_because_health_is_slow(
    routing: Routing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upstreams_module, "PROBE_TIMEOUT_S", 0.5)
    engine = FakeEngine(held=True, num_tokens=300)
    engine.release()
    async with (
        engine.serving(),
        routing(engine) as client,
        client.post(stream=True) as response,
    ):
        upstreams = client.router.upstreams
        await response.content.readline()
        engine.slow_health = True
        upstreams.suspect("a")
        while upstreams.is_healthy(upstreams["a"]):
            engine.release()
            await asyncio.sleep(0.02)
        engine.release(300)
        assert (await response.read()).endswith(b"data: [DONE]\n\n")


async def test_a_probe_of_an_address_says_nothing_of_the_next_one(routing: Routing) -> None:
    async with (
        FakeEngine(silent=True).serving() as elsewhere,
        FakeEngine().serving() as engine,
        routing(engine) as client,
    ):
        upstreams = client.router.upstreams
        engine.slow_health = True
        upstreams.suspect("a")
        num_asks = engine.num_health_asks
        await until(lambda: engine.num_health_asks > num_asks)
        upstreams.add(InstanceConfig(id="a", url=elsewhere.url))
        engine.slow_health = False
        # One probe follows the other.
        await until(lambda: elsewhere.num_health_asks > 0)
        assert not upstreams.is_healthy(upstreams["a"])


@pytest.mark.parametrize("field", ["num_kv_tokens", "max_num_seqs"])
def test_a_count_that_is_no_number_of_anything_is_refused(field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        validated(InstanceConfig, {"url": "http://a:1", field: 10**400}, source="test")
