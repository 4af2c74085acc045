"""The operators' port: what it tells, and instances that come and go while calls run."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.fakes import FakeEngine
from tests.router.conftest import CHAT, Routing
from tests.router.operators import ADMIN, KEY, Operator, from_file, text_of
from vllm_workflow.core.errors import ConfigError
from vllm_workflow.core.events import from_json
from vllm_workflow.core.replay import replay
from vllm_workflow.router.config import RouterConfig
from vllm_workflow.router.credentials import KeyHash, new_key

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/admin/status"),
        ("GET", "/admin/profiles"),
        ("POST", "/admin/instances"),
        ("DELETE", "/admin/instances/a"),
        ("POST", "/admin/reload"),
        ("GET", "/metrics"),
        ("GET", "/nothing"),
    ],
)
async def test_every_path_wants_the_operators_key(routing: Routing, method: str, path: str) -> None:
    async with FakeEngine().serving() as engine, routing(engine, admin=ADMIN) as client:
        for key in ("", "x" * 30, KEY[:-1], new_key()):
            status, answer = await Operator(client, key).ask(method, path)
            assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
        assert "a" in client.router.upstreams


async def test_clients_cannot_reach_what_is_the_operators(routing: Routing) -> None:
    async with FakeEngine().serving() as engine, routing(engine, admin=ADMIN) as client:
        async with client.get("/admin/status") as response:
            assert response.status == 404


async def test_without_a_section_there_is_no_such_port(routing: Routing) -> None:
    async with FakeEngine().serving() as engine, routing(engine) as client:
        assert client.router.admin_url == ""


def test_by_default_it_can_be_reached_from_this_machine_alone() -> None:
    data = {"instances": [{"url": "http://a:1"}], "admin": {"key_hash": ADMIN["key_hash"]}}
    config = RouterConfig.from_mapping(data, source="test")

    assert config.admin is not None
    assert config.admin.host == "127.0.0.1"


async def test_the_status_tells_what_goes_on(routing: Routing) -> None:
    async with FakeEngine(held=True).serving() as engine, routing(engine, admin=ADMIN) as client:
        call = asyncio.create_task(client.post().__aenter__())
        await engine.wait_for(received=1)
        code, status = await Operator(client).ask("GET", "/admin/status")
        engine.release()
        async with await call:
            pass

    assert code == 200
    assert status["policy"]["name"] == "workflow"
    assert status["policy"]["fingerprint"] == client.router.dispatcher.config.fingerprint
    assert (status["num_in_flight"], status["num_waiting"]) == (1, 0)
    assert status["instances"] == [
        {
            "id": "a",
            "url": engine.url,
            "state": "healthy",
            "models": ["m"],
            "num_in_flight": 1,
            "outstanding_s": status["instances"][0]["outstanding_s"],
            "drift": 1.0,
        }
    ]


async def test_what_was_learned_and_what_predictions_came_from_is_shown(routing: Routing) -> None:
    headers = {"X-Workflow-Name": "w", "X-Workflow-Stage": "generate", "X-Workflow-Id": "run"}
    async with FakeEngine().serving() as engine, routing(engine, admin=ADMIN) as client:
        for _ in range(2):
            async with client.post(headers=headers) as response:
                await response.read()
                assert response.status == 200
        code, learned = await Operator(client).ask("GET", "/admin/profiles")
        cold = await client.metric("predictions_total", length="prior", rest="prior")
        warm = await client.metric("predictions_total", length="learned", rest="prior")

    assert code == 200
    (stage,) = learned["stages"]
    assert (stage["workflow"], stage["stage"]) == ("w", "generate")
    assert stage["output_tokens"]["num_values"] == 2
    assert (cold, warm) == (1.0, 1.0)


async def test_an_instance_that_is_added_is_sent_calls(routing: Routing) -> None:
    old, new = FakeEngine(), FakeEngine(models=("n",))
    async with old.serving(), new.serving(), routing(old, admin=ADMIN) as client:
        operator = Operator(client)
        assert await operator.ask("POST", "/admin/instances", {"id": "b", "url": new.url}) == (
            201,
            {"id": "b"},
        )
        await operator.until({"a": "healthy", "b": "healthy"})
        async with client.post(model="n") as response:
            assert response.headers["X-Workflow-Instance"] == "b"
        again, _ = await operator.ask("POST", "/admin/instances", {"id": "b", "url": new.url})

    assert again == 409


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "body: url: expected a value, got none"),
        ([], "body: expected a mapping of fields, got []"),
        ({"url": "x"}, "body: url: expected http://HOST:PORT or https://HOST:PORT, got 'x'"),
        ({"url": "http://u:p@a:1"}, "body: url: expected no name and password"),
        ({"url": "http://a:1", "api_key": "s3cret"}, "body: api_key: unknown field"),
        (
            {"url": "http://a:1", "api_key_file": "keys/a"},
            "body: api_key_file: expected an absolute path on the router's machine, got 'keys/a'",
        ),
        ({"url": "https://a:1", "tls": {"ca_file": "./ca.pem"}}, "body: tls.ca_file: expected an"),
        ({"url": "https://a:1", "profile": "a.json"}, "body: profile: expected an absolute path"),
    ],
    ids=str,
)
async def test_an_instance_that_makes_no_sense_is_refused(
    routing: Routing, data: Any, message: str
) -> None:
    async with FakeEngine().serving() as engine, routing(engine, admin=ADMIN) as client:
        status, answer = await Operator(client).ask("POST", "/admin/instances", data)

    assert status == 400
    assert answer["error"]["message"].startswith(message)
    assert "s3cret" not in str(answer)


async def test_an_instance_is_drained_without_losing_a_call(
    routing: Routing, tmp_path: Path
) -> None:
    log = tmp_path / "decisions.jsonl"
    a, b = FakeEngine(held=True), FakeEngine()
    async with a.serving(), b.serving():
        async with routing(a, b, admin=ADMIN, decision_log=str(log)) as client:
            operator = Operator(client)
            calls = [asyncio.create_task(client.post(stream=True).__aenter__()) for _ in range(4)]
            async with asyncio.timeout(5):
                while len(a.received) + len(b.received) < 4:
                    await asyncio.sleep(0.01)
            num_on_a = len(a.received)
            status, answer = await operator.ask("DELETE", "/admin/instances/a?drain=true")
            assert (status, answer["id"]) == (202, "a")
            assert answer["num_in_flight"] >= 1
            await operator.until({"a": "leaving", "b": "healthy"})
            for _ in range(5):
                async with client.post() as response:
                    assert response.headers["X-Workflow-Instance"] == "b"
            a.release(100)
            for call in calls:
                async with await call as response:
                    assert (await response.read()).endswith(b"data: [DONE]\n\n")
            await operator.until({"b": "healthy"})
            assert await client.metric("instance_healthy", instance="a") is None
            gone, _ = await operator.ask("DELETE", "/admin/instances/a")

    assert gone == 404
    assert len(a.received) == num_on_a
    pairs = list(replay(from_json(line) for line in log.read_text("utf-8").splitlines()))
    assert len(pairs) == 9
    assert all(recorded == replayed for recorded, replayed in pairs)


async def test_no_call_is_lost_while_instances_come_and_go(
    routing: Routing, tmp_path: Path
) -> None:
    log = tmp_path / "decisions.jsonl"
    engines = [FakeEngine(num_tokens=5) for _ in range(3)]
    async with AsyncExitStack() as stack:
        for engine in engines:
            await stack.enter_async_context(engine.serving())
        client = await stack.enter_async_context(
            routing(*engines, seats=3, admin=ADMIN, decision_log=str(log))
        )
        operator, served = Operator(client), 0

        async def calls() -> None:
            nonlocal served
            while not changes.done():
                async with client.post(stream=served % 2 == 0) as response:
                    assert response.status == 200
                    await response.read()
                served += 1

        async def change() -> None:
            for n in range(6):
                instance_id, engine = "abc"[n % 3], engines[n % 3]
                status, _ = await operator.ask("DELETE", f"/admin/instances/{instance_id}")
                assert status == 202
                if n % 2:
                    while instance_id in await operator.instances():
                        await asyncio.sleep(0.01)
                data = {"id": instance_id, "url": engine.url, "max_num_seqs": 3}
                status, _ = await operator.ask("POST", "/admin/instances", data)
                assert status == 201
                await operator.until(dict.fromkeys("abc", "healthy"))

        changes = asyncio.create_task(change())
        await asyncio.gather(changes, *(calls() for _ in range(12)))

    assert served > 50
    assert sum(len(engine.received) for engine in engines) == served
    pairs = list(replay(from_json(line) for line in log.read_text("utf-8").splitlines()))
    assert len(pairs) >= served
    assert all(recorded == replayed for recorded, replayed in pairs)


async def test_an_instance_that_leaves_may_come_back(routing: Routing) -> None:
    a, b = FakeEngine(held=True), FakeEngine()
    async with a.serving(), b.serving(), routing(a, b, admin=ADMIN) as client:
        operator = Operator(client)
        call = asyncio.create_task(client.post(model="m").__aenter__())
        await a.wait_for(received=1)
        await operator.ask("DELETE", "/admin/instances/a")
        status, _ = await operator.ask("POST", "/admin/instances", {"id": "a", "url": a.url})
        assert status == 201
        await operator.until({"a": "healthy", "b": "healthy"})
        a.release()
        async with await call as response:
            assert response.headers["X-Workflow-Instance"] == "a"


async def test_without_draining_only_an_idle_instance_goes(routing: Routing) -> None:
    a, b = FakeEngine(held=True), FakeEngine()
    async with a.serving(), b.serving(), routing(a, b, admin=ADMIN) as client:
        operator = Operator(client)
        call = asyncio.create_task(client.post().__aenter__())
        await a.wait_for(received=1)
        status, answer = await operator.ask("DELETE", "/admin/instances/a?drain=false")
        assert status == 409
        assert "1 calls are under way on 'a'" in answer["error"]["message"]
        idle, _ = await operator.ask("DELETE", "/admin/instances/b?drain=false")
        odd, _ = await operator.ask("DELETE", "/admin/instances/a?drain=perhaps")
        await operator.until({"a": "healthy"})
        a.release()
        async with await call:
            pass

    assert (idle, odd) == (202, 400)


async def test_a_changed_file_is_taken_over_while_calls_run(tmp_path: Path) -> None:
    key = new_key()
    auth = f"auth: {{keys: [{{tenant: t, key_hash: '{KeyHash.of(key)}'}}]}}\nmax_body_mb: 1\n"
    a, b = FakeEngine(held=True), FakeEngine()
    async with a.serving(), b.serving():
        async with from_file(tmp_path / "router.yaml", text_of(a)) as (client, write):
            operator = Operator(client)
            call = asyncio.create_task(client.post().__aenter__())
            await a.wait_for(received=1)
            write(text_of(a, b, extra=auth).replace(f"{{id: a, url: '{a.url}'}}, ", ""))
            status, answer = await operator.ask("POST", "/admin/reload")
            assert (status, set(answer["changed"])) == (200, {"instances", "auth", "max_body_mb"})
            await operator.until({"a": "leaving", "b": "healthy"})
            async with client.post() as response:
                assert response.status == 401
            headers = {"Authorization": f"Bearer {key}"}
            async with client.post(headers=headers) as response:
                assert response.headers["X-Workflow-Instance"] == "b"
            async with client.post(b" " * 1_100_000, headers=headers) as response:
                assert response.status == 413
            a.release()
            async with await call as response:
                assert response.status == 200
            await operator.until({"b": "healthy"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("instances: []", "instances: expected at least one"),
        ("porty: 1", "porty: unknown field"),
        ("a: [", "not YAML"),
        ("auth: {keys: [{tenant: t, key_env: NOT_THERE}]}", "NOT_THERE: expected a key"),
        ("tls: {cert_file: x, key_file: y}", "cert_file, key_file: expected a certificate"),
    ],
)
async def test_a_file_that_cannot_be_used_changes_nothing_and_says_why(
    tmp_path: Path, change: str, message: str
) -> None:
    async with FakeEngine().serving() as a, FakeEngine().serving() as b:
        async with from_file(tmp_path / "router.yaml", text_of(a)) as (client, write):
            if "instances" in change:
                write(text_of(a).replace(f"instances: [{{id: a, url: '{a.url}'}}]", change))
            else:
                write(text_of(a, b, extra="max_body_mb: 1\n" + change))
            status, answer = await Operator(client).ask("POST", "/admin/reload")
            assert (status, answer["error"]["code"]) == (400, "invalid_config")
            assert message in answer["error"]["message"]
            assert await Operator(client).instances() == {"a": "healthy"}
            async with client.post(b'{"model":"m","a":"' + b" " * 1_100_000 + b'"}') as response:
                assert response.status == 200


async def test_without_a_file_there_is_nothing_to_read_again(routing: Routing) -> None:
    async with FakeEngine().serving() as engine, routing(engine, admin=ADMIN) as client:
        with pytest.raises(ConfigError, match="reload: the router was started without a file"):
            await client.router.reload()


async def test_a_moved_instance_is_found_at_its_new_address(tmp_path: Path) -> None:
    async with FakeEngine().serving() as a, FakeEngine().serving() as b:
        async with from_file(tmp_path / "router.yaml", text_of(a)) as (client, write):
            write(text_of(b))
            await client.router.reload()
            await Operator(client).until({"a": "healthy"})
            async with client.session.post(client.router.url + CHAT, json={}) as response:
                assert response.status == 200

    assert (len(a.received), len(b.received)) == (0, 1)


async def test_an_instance_that_has_left_leaves_no_series(routing: Routing) -> None:
    async with (
        FakeEngine().serving() as one,
        FakeEngine().serving() as two,
        routing(one, two, policy="round-robin") as client,
    ):
        for _ in range(4):
            async with client.post() as response:
                assert response.status == 200
        assert 'instance="b"' in client.router.metrics.exposition().decode()
        client.router.upstreams.drain("b")
        async with asyncio.timeout(10):
            while "b" in client.router.upstreams:
                await asyncio.sleep(0.02)
        text = client.router.metrics.exposition().decode()

    assert 'instance="b"' not in text
    assert 'instance="a"' in text


async def test_an_instance_that_comes_back_by_the_same_name_has_its_series_again(
    routing: Routing,
) -> None:
    async with FakeEngine().serving() as one, routing(one, admin=ADMIN) as client:
        operator = Operator(client)
        for _ in range(2):
            async with client.post() as response:
                assert response.status == 200
            counted = await client.metric("requests_total", instance="a", stage="", status="200")
            assert counted == 1.0
            assert await client.metric("actual_seconds_count", instance="a") == 1.0
            assert await client.metric("requests_in_flight", instance="a") == 0.0
            await operator.ask("DELETE", "/admin/instances/a")
            await operator.until({})
            await operator.ask("POST", "/admin/instances", {"id": "a", "url": one.url})
            await operator.until({"a": "healthy"})
