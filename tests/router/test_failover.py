"""What becomes of a call when an instance cannot answer it."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Iterator

import pytest

import vllm_workflow.router.proxy as proxy_module
import vllm_workflow.router.upstreams as upstreams_module
from tests.fakes import FakeEngine
from tests.router.conftest import Client, Routing
from vllm_workflow.router import tries
from vllm_workflow.router.instance_config import InstanceConfig

pytestmark = pytest.mark.anyio


@pytest.fixture
def refusing_url() -> Iterator[str]:
    """An address at which nobody listens, kept from others."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{held.getsockname()[1]}"


@pytest.fixture
def quick_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstreams_module, "PROBE_EVERY_S", 0.02)
    monkeypatch.setattr(upstreams_module, "PROBE_SICK_EVERY_S", 0.02)


async def until_healthy(client: Client, instance_id: str, healthy: bool) -> None:
    async with asyncio.timeout(5):
        while client.router.dispatcher.fleet.is_healthy(instance_id) is not healthy:
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
@pytest.mark.parametrize("stream", [True, False])
async def test_another_instance_answers_for_one_that_does_not(
    routing: Routing, status: int, stream: bool
) -> None:
    async with (
        FakeEngine(status=status).serving() as failing,
        FakeEngine().serving() as good,
        routing(failing, good) as client,
    ):
        async with client.post(stream=stream) as response:
            await response.read()

        assert (response.status, response.headers["X-Workflow-Instance"]) == (200, "b")
        assert (len(failing.received), len(good.received)) == (1, 1)
        assert await client.metric("failovers_total", instance="a", reason=str(status)) == 1
        # A full queue or a failed call is no reason to keep calls of others away.
        assert await client.metric("instance_healthy", instance="a") == 1


@pytest.mark.parametrize("stream", [True, False])
async def test_another_instance_answers_for_one_that_dies_before_the_first_byte(
    routing: Routing, stream: bool
) -> None:
    async with (
        FakeEngine(dies_after=0).serving() as dying,
        FakeEngine().serving() as good,
        routing(dying, good) as client,
    ):
        async with client.post(stream=stream) as response:
            await response.read()

        assert (response.status, response.headers["X-Workflow-Instance"]) == (200, "b")
        # Once more, because a kept connection that is just being closed looks the same; after
        # the headers of an answer it does not.
        assert len(dying.received) == (1 if stream else 2)


async def test_a_refused_connection_takes_an_instance_out_at_once(routing: Routing) -> None:
    engine = FakeEngine()
    async with FakeEngine().serving() as good:
        async with engine.serving(), routing(engine, good) as client:
            async with client.post() as response:
                assert response.headers["X-Workflow-Instance"] == "a"
            # Its socket goes away between two probes.
            client.router.upstreams["a"].url = "http://127.0.0.1:1"
            for _ in range(3):
                async with client.post() as response:
                    assert response.status == 200
                    assert response.headers["X-Workflow-Instance"] == "b"

            reason = {"instance": "a", "reason": "refused"}
            assert await client.metric("failovers_total", **reason) == 1
            assert await client.metric("instance_healthy", instance="a") == 0


async def test_an_instance_that_comes_up_is_taken_in_within_two_seconds(
    routing: Routing, refusing_url: str
) -> None:
    async with routing(refusing_url, max_wait_s=0) as client:
        async with client.post() as response:
            assert response.status == 503
            assert response.headers["Retry-After"] == "1"
            assert (await response.json())["error"] == {
                "message": "no instance can serve model 'm' now (none is healthy)",
                "type": "server_error",
                "param": None,
                "code": "no_instance",
            }
        async with client.get("/health") as response:
            assert response.status == 503

        async with FakeEngine().serving() as engine:
            client.router.upstreams["a"].url = engine.url
            async with asyncio.timeout(2):
                await until_healthy(client, "a", True)
            async with client.post() as response:
                assert response.status == 200
            async with client.get("/health") as response:
                assert response.status == 200
                assert (await response.json())["instances"] == {"a": True}


@pytest.mark.usefixtures("quick_probes")
async def test_an_engine_that_says_it_is_ill_gets_no_calls(routing: Routing) -> None:
    async with (
        FakeEngine().serving() as ill,
        FakeEngine().serving() as good,
        routing(ill, good) as client,
    ):
        ill.health = 503
        await until_healthy(client, "a", False)
        async with client.post() as response:
            assert response.headers["X-Workflow-Instance"] == "b"
        ill.health = 200
        await until_healthy(client, "a", True)


@pytest.mark.usefixtures("quick_probes")
@pytest.mark.parametrize("stream", [True, False])
async def test_calls_that_wait_for_a_hung_instance_go_to_another_one(
    routing: Routing, stream: bool
) -> None:
    async with (
        FakeEngine().serving() as hung,
        FakeEngine().serving() as good,
        routing(hung, good) as client,
    ):
        hung.silent = True
        async with client.post(stream=stream) as response:
            await response.read()

        assert (response.status, response.headers["X-Workflow-Instance"]) == (200, "b")
        assert await client.metric("failovers_total", instance="a", reason="hung") == 1
        assert await client.metric("instance_healthy", instance="a") == 0


@pytest.mark.parametrize("status", [429, 500, 503])
async def test_the_fleet_s_own_last_word_is_passed_on(
    routing: Routing, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_FIRST_PAUSE_S", "_MAX_PAUSE_S"):  # however long the other one takes to refuse
        monkeypatch.setattr(tries, name, 60.0)
    async with (
        FakeEngine(status=status, error_headers={"X-Why": "full"}).serving() as engine,
        FakeEngine(status=status).serving() as other,
        routing(engine, other, max_wait_s=0) as client,
    ):
        async with client.post() as response:
            assert response.status == status
            assert (await response.json())["error"]["message"] == "scripted"

        assert response.headers.get("Retry-After") == ("1" if status != 500 else None)
        assert (len(engine.received), len(other.received)) == (1, 1)


async def test_the_engine_s_own_retry_after_is_kept(routing: Routing) -> None:
    engine = FakeEngine(status=503, error_headers={"Retry-After": "17", "X-Why": "full"})
    async with engine.serving(), routing(engine, max_wait_s=0) as client:
        async with client.post() as response:
            assert response.headers["Retry-After"] == "17"
            assert response.headers["X-Why"] == "full"
            assert response.headers["X-Workflow-Instance"] == "a"


async def test_a_fleet_that_only_loses_calls_is_answered_for_by_the_router(
    routing: Routing,
) -> None:
    async with FakeEngine(dies_after=0).serving() as engine, routing(engine) as client:
        async with client.post() as response:
            error = (await response.json())["error"]

    assert response.status == 503
    assert response.headers["Retry-After"] == "1"
    assert "(a: closed; a: disconnected; a: disconnected; a: disconnected)" in error["message"]


async def test_a_call_that_kills_engines_does_not_kill_them_all(routing: Routing) -> None:
    async with (
        FakeEngine(dies_after=0).serving() as a,
        FakeEngine(dies_after=0).serving() as b,
        FakeEngine(dies_after=0).serving() as c,
        routing(a, b, c) as client,
    ):
        async with client.post() as response:
            assert response.status == 503

        # The first might have met a kept connection that was just being closed.
        assert sum(len(e.received) for e in (a, b, c)) == 1 + 3


async def test_a_call_whose_budget_ends_before_an_instance_is_back_is_told_when_to_try_again(
    routing: Routing, refusing_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proxy_module, "MIN_WAIT_S", 0.0)
    async with routing(refusing_url, max_wait_s=60) as client:
        begin = time.monotonic()
        async with client.post(headers={"X-Workflow-Budget-Ms": "1200"}, max_tokens=2) as response:
            assert (response.status, response.headers["Retry-After"]) == (503, "1")

        assert 0.8 < time.monotonic() - begin < 1.4


async def test_a_call_that_engines_fail_at_is_not_tried_on_all_of_them(routing: Routing) -> None:
    async with (
        FakeEngine(status=500).serving() as a,
        FakeEngine(status=502).serving() as b,
        FakeEngine(status=504).serving() as c,
        FakeEngine().serving() as d,
        routing(a, b, c, d) as client,
    ):
        async with client.post() as response:
            assert response.status == 504

        assert d.received == []


@pytest.mark.parametrize("headers", [{}, {"X-Workflow-Budget-Ms": "20000"}])
async def test_a_call_that_a_busy_fleet_refuses_is_tried_again_until_there_is_room(
    routing: Routing, headers: dict[str, str]
) -> None:
    async with (
        FakeEngine(status=503).serving() as engine,
        routing(engine) as client,
        asyncio.TaskGroup() as tasks,
    ):
        call = tasks.create_task(client.post(headers=headers).__aenter__())
        await engine.wait_for(received=3)
        engine.status = 200

        assert (await call).status == 200


async def test_a_busy_fleet_is_asked_to_the_last_instance(routing: Routing) -> None:
    async with (
        FakeEngine(status=503).serving() as a,
        FakeEngine(status=429).serving() as b,
        FakeEngine(status=503).serving() as c,
        FakeEngine(status=503).serving() as d,
        FakeEngine().serving() as e,
        routing(a, b, c, d, e) as client,
    ):
        async with client.post() as response:
            assert response.headers["X-Workflow-Instance"] == "e"


async def test_the_second_instance_is_told_the_budget_that_is_left(routing: Routing) -> None:
    async with (
        FakeEngine(status=503, held=True).serving() as slow,
        FakeEngine().serving() as good,
        routing(slow, good) as client,
    ):
        async with client.post(headers={"X-Workflow-Budget-Ms": "5000"}) as response:
            assert response.status == 200

    first, second = slow.received[0].xargs, good.received[0].xargs
    assert 0 < second["wf_budget_ms"] <= first["wf_budget_ms"] <= 5000
    assert first["wf_service_ms"] > 0


async def test_only_instances_that_serve_the_model_are_asked(routing: Routing) -> None:
    async with (
        FakeEngine(models=("m", "adapter")).serving() as one,
        FakeEngine(models=("n",)).serving() as other,
        routing(one, other) as client,
    ):
        for model, instance_id in (("m", "a"), ("adapter", "a"), ("n", "b")):
            async with client.post({"model": model}) as response:
                assert response.headers["X-Workflow-Instance"] == instance_id
        async with client.get("/v1/models") as response:
            models = await response.json()
        async with client.post({"model": "x"}) as response:
            assert response.status == 404

    assert models["object"] == "list"
    assert [card["id"] for card in models["data"]] == ["m", "adapter", "n"]


async def test_a_model_served_twice_is_listed_once(routing: Routing) -> None:
    async with (
        FakeEngine().serving() as one,
        FakeEngine().serving() as other,
        routing(one, other) as client,
    ):
        async with client.get("/v1/models") as response:
            assert [card["id"] for card in (await response.json())["data"]] == ["m"]


async def test_configured_models_are_what_is_served(routing: Routing) -> None:
    async with FakeEngine(models=("m", "n")).serving() as engine:
        instance = {"id": "a", "url": engine.url, "models": ["m", "alias"]}
        async with routing(instances=[instance]) as client:
            async with client.get("/v1/models") as response:
                cards = (await response.json())["data"]
            async with client.post({"model": "n"}) as response:
                assert response.status == 404

    assert cards == [
        {"id": "m", "object": "model"},
        {"id": "alias", "object": "model", "created": 0, "owned_by": "vllm"},
    ]


@pytest.mark.usefixtures("quick_probes")
async def test_an_adapter_loaded_later_is_noticed(
    routing: Routing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upstreams_module, "MODELS_EVERY", 1)
    async with FakeEngine().serving() as engine, routing(engine) as client:
        engine.models = ("m", "new")
        async with asyncio.timeout(5):
            while not client.router.dispatcher.fleet.serves("new"):
                await asyncio.sleep(0.005)
        async with client.post({"model": "new"}) as response:
            assert response.status == 200


@pytest.mark.usefixtures("quick_probes")
async def test_an_instance_that_comes_back_is_asked_anew_what_it_serves(
    routing: Routing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upstreams_module, "MODELS_EVERY", 1_000_000)
    async with FakeEngine().serving() as engine, routing(engine) as client:
        engine.health = 503
        await until_healthy(client, "a", False)
        engine.models = ("n",)
        engine.health = 200
        await until_healthy(client, "a", True)
        async with client.post({"model": "n"}) as response:
            assert response.status == 200


async def test_while_all_instances_are_being_replaced_calls_wait_for_the_new_ones(
    routing: Routing,
) -> None:
    async with (
        FakeEngine().serving() as old,
        FakeEngine().serving() as new,
        routing(old) as client,
        asyncio.TaskGroup() as tasks,
    ):
        upstreams = client.router.upstreams
        upstreams.drain("a")
        async with asyncio.timeout(5):
            while "a" in upstreams:
                await asyncio.sleep(0.005)
        call = tasks.create_task(client.post().__aenter__())
        async with asyncio.timeout(5):
            while not client.router.proxy._binder.num_stranded:
                await asyncio.sleep(0.005)
        upstreams.add(InstanceConfig(id="b", url=new.url))

        assert (await call).headers["X-Workflow-Instance"] == "b"
