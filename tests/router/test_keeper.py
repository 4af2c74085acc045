"""What a router has learned is there for the next one."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import sqlite3
import sys
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.builders import stage_request
from tests.fakes import FakeEngine
from tests.router.conftest import CHAT, Client, Routing
from vllm_workflow.core.config import PRESETS
from vllm_workflow.core.dispatcher import Dispatcher
from vllm_workflow.core.events import Marked, from_json
from vllm_workflow.core.fleet import Fleet, Instance
from vllm_workflow.core.latency import LatencyModel
from vllm_workflow.core.replay import replay
from vllm_workflow.core.types import Outcome
from vllm_workflow.router.keeper import SPEEDS, WORKFLOWS, Keeper
from vllm_workflow.router.store import Store, StoreReader

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


def dispatcher() -> Dispatcher:
    fleet = Fleet()
    fleet.add(Instance(instance_id="a", models=(), latency=LatencyModel()))
    return Dispatcher(fleet, PRESETS["workflow"])


def serve(dispatcher: Dispatcher, name: str) -> None:
    request = stage_request(
        request_id=name, workflow_id=name, workflow="report", stage="draft", tenant_id="acme"
    )
    dispatcher.submit(request, now=0.0, num_prompt_bytes=100)
    dispatcher.settle(
        Outcome(
            request_id=name,
            instance_id="a",
            ok=True,
            ttft_s=0.1,
            e2el_s=0.2,
            num_prompt_tokens=30,
            num_output_tokens=20,
        )
    )


@given(st.randoms(use_true_random=False), st.sampled_from([1, 1, 4, 16]), st.integers(0, 5))
@settings(max_examples=150, deadline=None)
def test_whatever_is_damaged_a_router_starts_and_learns_on(
    rng: random.Random, num_places: int, how: int
) -> None:
    """Half of this SQLite does not notice: it does not look at what stands on its pages."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state.db"
        damaged = bytearray(_kept())
        for _ in range(num_places):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        if how == 0:
            del damaged[rng.randrange(len(damaged)) :]
        path.write_bytes(damaged)

        again, store = dispatcher(), Store(path)
        keeper = Keeper(again, store)
        keeper.restore()
        serve(again, "next")
        keeper.keep()
        store.close()

        if store.num_dropped:  # what is met only later: the file is begun anew then
            assert list(Path(folder).glob("*.unusable-*"))
        else:
            with StoreReader(path) as reader:
                speeds = reader.learned(SPEEDS)
            assert speeds is not None
            assert speeds["instances"]["a"]["num_observed"] >= 1


@cache
def _kept() -> bytes:
    """A database that a router has left."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state.db"
        first, store = dispatcher(), Store(path)
        keeper = Keeper(first, store)
        for number in range(20):
            serve(first, f"{number}")
            store.record(Marked(instance_id="a", healthy=True))
        store.tuned({"gain": 0.1})
        store.used("acme", prompt_tokens=10, output_tokens=2, service_s=0.5)
        keeper.keep()
        store.close()
        return path.read_bytes()
