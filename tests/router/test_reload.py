"""What a changed router.yaml changes in a router that runs, and what it cannot."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.fakes import FakeEngine
from tests.router.conftest import answered_by, names, until
from tests.router.operators import ADMIN, KEY, Operator, changed, from_file, text_of
from tests.router.test_router_process import process
from vllm_workflow.core.config import PolicyConfig
from vllm_workflow.core.errors import ConfigError
from vllm_workflow.core.events import from_json
from vllm_workflow.core.replay import replay
from vllm_workflow.router.app import serve
from vllm_workflow.router.config import RouterConfig
from vllm_workflow.router.credentials import KeyHash, new_key

pytestmark = pytest.mark.anyio

T = {"X-Tenant-Id": "t"}
RUN = {"X-Workflow-Name": "w", "X-Workflow-Stage": "first", "X-Workflow-Slo-Ms": "60000"}


def assert_replays(log: Path) -> None:
    lines = log.read_text(encoding="utf-8").splitlines()
    assert all(now == then for then, now in replay(from_json(line) for line in lines))


async def test_another_policy_decides_from_the_next_call_on(tmp_path: Path) -> None:
    log = tmp_path / "decisions.jsonl"
    async with FakeEngine().serving() as a, FakeEngine().serving() as b:

        def text(policy: str) -> str:
            return text_of(a, b, extra=f"policy: {policy}\ndecision_log: decisions.jsonl\n")

        async with from_file(tmp_path / "router.yaml", text("round-robin")) as (client, write):
            assert {await answered_by(client) for _ in range(2)} == {"a", "b"}
            write(text("least-outstanding"))
            assert await changed(client) == {"policy"}
            wanted = PolicyConfig.from_name("least-outstanding", source="test").fingerprint
            async with client.get("/health") as response:
                assert (await response.json())["policy"] == wanted
            assert [await answered_by(client) for _ in range(3)] == ["a"] * 3
            assert await changed(client) == set()

    assert_replays(log)
    assert [json.loads(line)["event"] for line in log.read_text().splitlines()].count(
        "swapped"
    ) == 1


async def test_a_policy_file_that_holds_another_policy_is_taken_over(tmp_path: Path) -> None:
    policy = tmp_path / "policy.json"
    policy.write_text(PolicyConfig(patience_s=30.0).to_json())
    async with FakeEngine().serving() as a:
        text = text_of(a, extra="policy: ./policy.json\n")
        async with from_file(tmp_path / "router.yaml", text) as (client, _):
            policy.write_text(PolicyConfig(patience_s=40.0).to_json())
            assert await changed(client) == {"policy"}
            assert client.router.dispatcher.config.patience_s == 40.0
            policy.write_text("{")
            status, _ = await Operator(client).ask("POST", "/admin/reload")
            assert status == 400
            assert client.router.dispatcher.config.patience_s == 40.0


async def test_what_a_tuner_has_found_stays_unless_the_file_names_another_policy(
    tmp_path: Path,
) -> None:
    async with FakeEngine().serving() as a:
        text = text_of(a, extra="policy: hexgen\n")
        async with from_file(tmp_path / "router.yaml", text) as (client, write):
            found = PolicyConfig(dispatch="hexgen", ordering="urgency", alpha=0.9, preempt=False)
            client.router.dispatcher.swap(found, now=0.0)
            write(text + "log_prompts: true\n")
            assert await changed(client) == {"log_prompts"}
            assert client.router.dispatcher.config == found
            write(text.replace("hexgen", "workflow"))
            assert await changed(client) == {"policy", "log_prompts"}
            assert client.router.dispatcher.config.dispatch == "predicted-finish"


async def test_a_tuner_begins_and_ends_with_a_reload(tmp_path: Path) -> None:
    log, policy = tmp_path / "decisions.jsonl", tmp_path / "policy.json"
    async with FakeEngine().serving() as a:
        text = text_of(a, extra="decision_log: decisions.jsonl\n")
        async with from_file(tmp_path / "router.yaml", text) as (client, write):
            brain = client.router.dispatcher
            policy.write_text(PolicyConfig(patience_s=10.0).to_json())
            write(text + "tuner: {interval_s: 1000}\n")
            assert await changed(client) == {"tuner"}
            new = PolicyConfig(patience_s=20.0)
            await until_watched(policy, new.to_json(), lambda: brain.config == new)
            write(text + "tuner: {interval_s: 1000, policy_file: other.json}\n")
            await changed(client)
            other = PolicyConfig(patience_s=30.0)
            path = tmp_path / "other.json"
            await until_watched(path, other.to_json(), lambda: brain.config == other)
            write(text)
            assert await changed(client) == {"tuner"}
            assert_replays(log)


async def until_watched(path: Path, text: str, holds: Callable[[], bool]) -> None:
    """Write a file again and again until it is taken over: when it is first looked at is chance,
    and what it held then is not taken."""

    def again() -> bool:
        new = path.with_suffix(".new")
        new.write_text(text, "utf-8")
        os.replace(new, path)
        return holds()

    await until(again)


async def test_tenants_come_change_and_go_while_their_calls_wait(tmp_path: Path) -> None:
    log = tmp_path / "decisions.jsonl"
    async with FakeEngine(held=True).serving() as engine:
        text = text_of(engine, extra="decision_log: decisions.jsonl\n")
        quota = "tenants: {{named: {{t: {{max_concurrent_calls: {}}}}}}}\n"
        async with from_file(tmp_path / "router.yaml", text) as (client, write):
            calls = [asyncio.ensure_future(answered_by(client, T))]
            await engine.wait_for(received=1)

            write(text + quota.format(1))
            assert await changed(client) == {"tenants"}
            calls.append(asyncio.ensure_future(answered_by(client, T)))
            await until(lambda: len(client.router.dispatcher.waiting) == 1)
            assert await client.metric("tenant_requests_in_flight", tenant="t") == 1.0

            write(text + quota.format(2))
            await changed(client)
            await engine.wait_for(received=2)
            calls.append(asyncio.ensure_future(answered_by(client, T)))
            await until(lambda: len(client.router.dispatcher.waiting) == 1)

            write(text)
            await changed(client)
            await engine.wait_for(received=3)
            assert await client.metric("tenant_requests_in_flight", tenant="t") is None

            write(text + quota.format(7))  # series that were there once can come back
            await changed(client)
            assert await client.metric("tenant_requests_in_flight", tenant="t") == 3.0
            engine.release(3)
            assert await asyncio.gather(*calls) == ["a"] * 3

    assert_replays(log)
    events = [json.loads(line)["event"] for line in log.read_text().splitlines()]
    assert events.count("apportioned") == 4


async def test_workflows_declared_anew_are_what_is_predicted_from_then_on(tmp_path: Path) -> None:
    stages = "{name: first, output_tokens: 10}, {name: second, rounds: 8, output_tokens: 400}"
    declared = f"workflows: [{{name: w, stages: [{stages}]}}]\n"
    async with FakeEngine().serving() as engine:
        async with from_file(tmp_path / "router.yaml", text_of(engine)) as (client, write):
            await answered_by(client, RUN)
            write(text_of(engine, extra=declared))
            assert await changed(client) == {"workflows"}
            await answered_by(client, RUN)
            write(text_of(engine))
            await changed(client)
            await answered_by(client, RUN)

    rests = [received.xargs["wf_rest_ms"] for received in engine.received]
    assert rests[0] == rests[2] == 0
    assert rests[1] > 100


async def test_how_long_calls_wait_for_an_instance_is_changed(tmp_path: Path) -> None:
    async with FakeEngine(health=500).serving() as engine:
        text = text_of(engine, extra="max_wait_s: {}\n")
        async with from_file(tmp_path / "router.yaml", text.replace("{}", "600")) as (
            client,
            write,
        ):
            write(text.replace("{}", "0"))
            assert await changed(client) == {"max_wait_s"}
            async with client.post() as response:
                assert response.status == 503


async def test_priorities_are_added_as_soon_as_the_file_says_so(tmp_path: Path) -> None:
    async with FakeEngine().serving() as engine:
        async with from_file(tmp_path / "router.yaml", text_of(engine)) as (client, write):
            await answered_by(client, RUN)
            write(text_of(engine, extra="set_priority: true\n"))
            assert await changed(client) == {"set_priority"}
            await answered_by(client, RUN)

    assert ["priority" in received.body for received in engine.received] == [False, True]


async def test_what_others_have_sent_is_forgotten_when_nobody_asks_for_it_any_more(
    tmp_path: Path,
) -> None:
    async with FakeEngine(load=(7, 0.5)).serving() as engine:
        async with from_file(tmp_path / "router.yaml", text_of(engine)) as (client, write):
            others = client.router.upstreams["a"]
            await until(lambda: others.others.num_calls == 7)
            write(text_of(engine, extra="read_load: false\n"))
            assert await changed(client) == {"read_load"}
            assert others.others.num_calls == 0


async def test_the_operators_key_is_replaced(tmp_path: Path) -> None:
    new = new_key()
    async with FakeEngine().serving() as engine:
        async with from_file(tmp_path / "router.yaml", text_of(engine)) as (client, write):
            write(text_of(engine).replace(ADMIN["key_hash"], str(KeyHash.of(new))))  # type: ignore[arg-type]
            assert await changed(client) == {"admin"}
            status, _ = await Operator(client, KEY).ask("GET", "/admin/status")
            assert status == 401
            status, _ = await Operator(client, new).ask("GET", "/admin/status")
            assert status == 200


async def test_clients_keys_in_files_are_read_again(tmp_path: Path) -> None:
    old, new = new_key(), new_key()
    file = tmp_path / "client.key"
    file.write_text(old)
    async with FakeEngine().serving() as engine:
        text = text_of(engine, extra="auth: {keys: [{tenant: t, key_file: client.key}]}\n")
        async with from_file(tmp_path / "router.yaml", text) as (client, _):
            file.write_text(new)
            assert await changed(client) == {"auth"}
            for key, status in ((old, 401), (new, 200)):
                async with client.post(headers={"Authorization": f"Bearer {key}"}) as response:
                    assert response.status == status


@pytest.mark.parametrize(
    ("before", "after", "field"),
    [
        ("", "host: 127.0.0.2\n", "host"),
        ("", "decision_log: other.jsonl\n", "decision_log"),
        ("", "dashboard: false\n", "dashboard"),
        ("", "store: {path: state.db}\n", "store"),
        ("store: {path: state.db}\n", "store: {path: other.db}\n", "store.path"),
        ("store: {path: s.db}\n", "store: {path: s.db, max_events: 0}\n", "store.max_events"),
        ("", "tracing: {otlp_endpoint: 'http://127.0.0.1:1'}\n", "tracing"),
    ],
)
async def test_what_cannot_change_is_refused_by_name_and_nothing_else_changes(
    tmp_path: Path, before: str, after: str, field: str
) -> None:
    async with FakeEngine().serving() as a, FakeEngine().serving() as b:
        async with from_file(tmp_path / "router.yaml", text_of(a, extra=before)) as (client, write):
            policy = client.router.dispatcher.config
            write(text_of(a, b, extra=after + "policy: hexgen\n"))
            status, answer = await Operator(client).ask("POST", "/admin/reload")

            assert (status, answer["error"]["code"]) == (409, "restart_needed")
            assert answer["error"]["param"] == field
            assert f"{field}: changed, which needs a restart" in answer["error"]["message"]
            assert client.router.dispatcher.config is policy
            assert names(client) == {"a"}
            write(text_of(a, b, extra=before))
            assert await changed(client) == {"instances"}


async def test_the_operators_port_cannot_move(tmp_path: Path) -> None:
    async with FakeEngine().serving() as a:
        async with from_file(tmp_path / "router.yaml", text_of(a)) as (client, write):
            write(text_of(a).replace("admin: {port: 0", "admin: {host: 127.0.0.2, port: 0"))
            status, answer = await Operator(client).ask("POST", "/admin/reload")
            assert (status, answer["error"]["param"]) == (409, "admin.host")
            write(text_of(a).replace("port: 0\nshutdown", "port: 1\nshutdown"))
            status, answer = await Operator(client).ask("POST", "/admin/reload")
            assert (status, answer["error"]["param"]) == (409, "port")


async def test_a_reload_goes_on_though_whoever_asked_for_it_leaves(tmp_path: Path) -> None:
    async with FakeEngine().serving() as a:
        async with from_file(tmp_path / "router.yaml", text_of(a)) as (client, write):
            write(text_of(a, extra="log_prompts: true\n"))
            asking = asyncio.ensure_future(client.router.reload())
            await asyncio.sleep(0)
            asking.cancel()
            await until(lambda: client.router.proxy.log_prompts)


async def test_a_router_that_stops_takes_over_nothing_more(tmp_path: Path) -> None:
    is_read, goes_on = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()
    async with FakeEngine().serving() as a, FakeEngine().serving() as b:
        config, changed = (
            RouterConfig.from_mapping(yaml.safe_load(text_of(*engines)), source="test")
            for engines in ((a,), (a, b))
        )

        def read() -> RouterConfig:
            loop.call_soon_threadsafe(is_read.set)
            goes_on.wait()
            return changed

        try:
            async with asyncio.timeout(60), serve(config, read) as router:
                asking = asyncio.ensure_future(router.reload())
                await is_read.wait()
        finally:
            goes_on.set()
        with pytest.raises(asyncio.CancelledError):
            await asking
        with pytest.raises(ConfigError, match="reload: the router is stopping"):
            await router.reload()
        assert router.reload.config is config


async def test_the_log_is_as_the_file_says(tmp_path: Path) -> None:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        async with FakeEngine().serving() as a:
            async with from_file(tmp_path / "router.yaml", text_of(a)) as (client, write):
                for text, wanted in (("debug", logging.DEBUG), ("error", logging.ERROR)):
                    write(text_of(a, extra=f"log_level: {text}\n"))
                    assert await changed(client) == {"log_level"}
                    assert root.level == wanted
                assert len(root.handlers) == len(handlers) + 1
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


async def test_sighup_takes_over_a_file_and_tells_in_the_log_why_not(tmp_path: Path) -> None:
    path = tmp_path / "router.yaml"
    async with FakeEngine().serving() as engine:
        text = f"port: 0\nlog_format: json\ninstances: [{{id: a, url: '{engine.url}'}}]\n"
        path.write_text(text)
        async with process("--config", str(path), log=True) as (running, _), asyncio.timeout(60):
            assert running.stderr is not None

            async def told(part: str) -> str:
                while part not in (line := (await running.stderr.readline()).decode()):
                    assert line, f"no line with {part!r}"
                return line

            path.write_text(text + "dashboard: false\n")
            running.send_signal(signal.SIGHUP)
            refused = json.loads(await told("reload: "))
            path.write_text(text + "policy: hexgen\nadmin: {port: 0}\n")
            running.send_signal(signal.SIGHUP)
            broken = json.loads(await told("reload: "))
            path.write_text(text + "policy: hexgen\n")
            running.send_signal(signal.SIGHUP)
            taken = json.loads(await told("configuration read again"))
            running.terminate()
            assert await running.wait() == 0

    assert (refused["level"], broken["level"]) == ("ERROR", "ERROR")
    assert "dashboard: changed, which needs a restart" in refused["message"]
    assert "admin: expected one of key_hash, key_env, key_file" in broken["message"]
    assert taken["message"].endswith("changed: policy")
