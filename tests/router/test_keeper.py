"""What a router has learned is there for the next one."""

from __future__ import annotations

import asyncio
import json
import signal
import sqlite3
import sys
import time
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.fakes import FakeEngine
from tests.router.conftest import CHAT, Client, Routing
from vllm_workflow.core.events import from_json
from vllm_workflow.core.replay import replay
from vllm_workflow.router.keeper import SPEEDS, WORKFLOWS
from vllm_workflow.router.store import StoreReader

pytestmark = pytest.mark.anyio
HEADERS = {"X-Workflow-Name": "report", "X-Workflow-Stage": "draft"}


async def calls(client: Client, number: int) -> None:
    for _ in range(number):
        async with client.post(headers=HEADERS) as response:
            assert response.status == 200


def expected_tokens(client: Client) -> float:
    lengths = client.router.dispatcher.predictor.lengths
    return float(lengths.output_tokens(("", "report", "draft"), 100)[0])


async def test_the_next_router_predicts_as_the_last_one_did(
    routing: Routing, tmp_path: Path
) -> None:
    store = {"path": str(tmp_path / "state.db")}
    async with FakeEngine().serving() as engine:
        async with routing(engine, store=store) as client:
            before = expected_tokens(client)
            await calls(client, 12)
            learned = expected_tokens(client)
            drift = client.router.dispatcher.fleet.drift("a")
        async with routing(engine, store=store) as client:
            assert expected_tokens(client) == learned != before
            assert client.router.dispatcher.fleet.drift("a") == drift != 1.0
            await calls(client, 3)
        # Another GPU under the same name: what was learned of the old one says nothing.
        async with FakeEngine().serving() as other:
            instances = [{"url": other.url, "id": "a", "latency": {"weights_ms": 99.0}}]
            async with routing(store=store, instances=instances) as client:
                assert client.router.dispatcher.fleet.drift("a") == 1.0
                assert expected_tokens(client) == learned

    # The restored speed is an event, so that the second router's decisions can be made again.
    with StoreReader(tmp_path / "state.db") as reader:
        decisions = list(replay(from_json(line) for line in reader.events()))
    assert len(decisions) == 15
    assert all(before == now for before, now in decisions)


async def test_a_killed_router_has_lost_a_second_at_most(routing: Routing, tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    async with FakeEngine().serving() as engine:
        config = {
            "port": 0,
            "instances": [{"url": engine.url, "id": "a"}],
            "store": {"path": str(path)},
        }
        file = tmp_path / "router.yaml"
        await asyncio.to_thread(file.write_text, json.dumps(config))
        command = (sys.executable, "-m", "vllm_workflow.cli.main", "router", "--config", str(file))
        process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        assert process.stdout is not None
        url = (await process.stdout.readline()).decode().split()[3].rstrip(":")
        body = {"model": "m", "messages": []}
        async with aiohttp.ClientSession() as session:
            last, number = time.monotonic(), 0
            ended: list[float] = []
            while time.monotonic() < last + 2.5:
                async with session.post(url + CHAT, json=body, headers=HEADERS) as response:
                    assert response.status == 200
                number += 1
                ended.append(time.monotonic())
        process.send_signal(signal.SIGKILL)
        killed = time.monotonic()
        await process.wait()

    learned_before = sum(at < killed - 1.0 for at in ended)
    with StoreReader(path) as reader:
        speeds = reader.learned(SPEEDS)
        assert reader.learned(WORKFLOWS) is not None
    assert speeds is not None
    assert learned_before > 0
    assert learned_before <= speeds["instances"]["a"]["num_observed"] <= number


@pytest.mark.parametrize(
    ("kind", "value", "problem"),
    [
        (WORKFLOWS, {"version": 99}, "version: expected 1, got 99"),
        (WORKFLOWS, {"version": 1, "lengths": 3}, "cannot read what was learned"),
        (SPEEDS, {"instances": 3}, "expected instances"),
        (SPEEDS, {"instances": {"a": {"drift": 1e9}}}, "speeds: a"),
        (
            SPEEDS,
            {"instances": {"a": {"latency": "", "drift": 0, "num_observed": 1, "hit_share": 1}}},
            "drift, hit_share",
        ),
    ],
)
async def test_what_cannot_be_read_is_left_and_the_router_starts(
    routing: Routing,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    kind: str,
    value: dict[str, Any],
    problem: str,
) -> None:
    path = tmp_path / "state.db"
    async with FakeEngine().serving() as engine:
        async with routing(engine, store={"path": str(path)}):
            pass
        with sqlite3.connect(path) as connection:
            connection.execute(
                "INSERT OR REPLACE INTO learned VALUES (?, ?, 0)", (kind, json.dumps(value))
            )
        connection.close()
        async with routing(engine, store={"path": str(path)}) as client:
            await calls(client, 1)
    assert problem in caplog.text
