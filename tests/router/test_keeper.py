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
from collections.abc import Callable, Mapping
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
from vllm_workflow.router.store import Store, StoreReader, part_of

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


@pytest.mark.parametrize("num_known", [0, 2000])
async def test_a_killed_router_has_lost_a_second_at_most(tmp_path: Path, num_known: int) -> None:
    """However many workflows it knows."""
    path = tmp_path / "state.db"
    first, store = dispatcher(), Store(path)
    keeper = Keeper(first, store)
    for known in range(num_known):
        serve(first, f"{known}", workflow=f"workflow {known}", final=True)
    keeper.keep()
    store.close()
    async with FakeEngine().serving() as engine:
        config = {
            "port": 0,
            "instances": [{"url": engine.url, "id": "b"}],
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
    assert speeds is not None
    assert learned_before > 0
    assert learned_before <= speeds["instances"]["b"]["num_observed"] <= number
    after = restored(path).predictor.learned.to_mapping()["lengths"]
    assert len(after) == num_known + 1
    assert after[-1][1] == "report"


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


def serve(
    dispatcher: Dispatcher, name: str, *, workflow: str = "report", final: bool = False
) -> None:
    request = stage_request(
        request_id=name,
        workflow_id=name,
        workflow=workflow,
        stage="draft",
        tenant_id="acme",
        final=final,
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


def learned(dispatcher: Dispatcher) -> dict[str, Any]:
    """What was learned, in any order."""
    data = dispatcher.predictor.learned.to_mapping()
    return data | {name: sorted(data[name], key=str) for name in ("lengths", "rests", "flows")}


def restored(path: Path) -> Dispatcher:
    again, store = dispatcher(), Store(path)
    Keeper(again, store).restore()
    store.close()
    return again


def test_what_is_kept_in_parts_is_all_that_was_learned(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    first, store = dispatcher(), Store(path)
    keeper = Keeper(first, store)
    for number in range(40):
        serve(first, f"{number}", workflow=f"workflow {number % 5}", final=number % 2 == 0)
        if number % 7 == 0:
            keeper.keep()
    keeper.keep()
    store.close()

    wanted = learned(first)
    assert all(wanted[name] for name in ("lengths", "rests", "flows"))
    assert learned(restored(path)) == wanted


def test_what_an_earlier_version_kept_in_one_piece_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    first, store = dispatcher(), Store(path)
    for number in range(20):
        serve(first, f"{number}", final=True)
    store.keep(WORKFLOWS, first.predictor.learned.to_mapping())
    store.close()

    wanted = learned(first)
    second, store = dispatcher(), Store(path)
    keeper = Keeper(second, store)
    keeper.restore()
    assert learned(second) == wanted
    serve(second, "next", workflow="another")
    keeper.keep()
    store.close()
    assert learned(restored(path)) == learned(second)
    with StoreReader(path) as reader:
        assert reader.learned(WORKFLOWS) == {}


def test_a_part_that_cannot_be_used_costs_no_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "state.db"
    first, store = dispatcher(), Store(path)
    keeper = Keeper(first, store)
    serve(first, "1", workflow="good")
    keeper.keep()
    for part, value in (
        ("lengths/bad", {"row": 3}),
        ("tokens_per_byte/", {"row": [-1.0]}),
        ("rests/bad", {}),
        ("widths/bad", {"row": []}),
    ):
        store.keep(part_of(WORKFLOWS, part), value)
    store.close()

    again = restored(path)

    ((_, workflow, _, _),) = learned(again)["lengths"]
    assert workflow == "good"
    assert caplog.text.count("left out") == 4


def test_however_much_was_learned_what_is_new_is_all_that_is_written(tmp_path: Path) -> None:
    """Or a router that knows many workflows would stand still for it, and write seldom."""
    first, store = dispatcher(), Store(tmp_path / "state.db")
    keeper = Keeper(first, store)
    for number in range(300):
        serve(first, f"{number}", workflow=f"workflow {number}", final=True)
    keeper.keep()
    parts: list[str] = []
    store.keep = lambda kind, value: parts.append(kind)  # type: ignore[method-assign]
    serve(first, "next", workflow="workflow 7", final=True)
    keeper.keep()
    keeper.keep()
    store.close()

    assert len(parts) == 5  # speeds, tokens per byte; its lengths, rest and flow
    assert sum("workflow 7" in part for part in parts) == 3


@pytest.mark.parametrize("error", [sqlite3.OperationalError, sqlite3.DatabaseError])
def test_what_the_store_could_not_write_is_kept_again(tmp_path: Path, error: Any) -> None:
    """Parts that do not change any more would be lost for ever."""
    first, store = dispatcher(), Store(tmp_path / "state.db")
    keeper = Keeper(first, store)
    for number in range(20):
        serve(first, f"{number}", workflow=f"workflow {number}", final=True)
        if number == 10:
            keeper.keep()
            wait_until(lambda: store.num_written > 0)
    connection = store._connection
    store._connection = Failing(connection, error)  # type: ignore[assignment]
    keeper.keep()
    wait_until(lambda: store.num_losses > 0)
    if error is sqlite3.OperationalError:
        store._connection = connection
    keeper.keep()
    store.close()

    assert learned(restored(store.path)) == learned(first)


class Failing:
    """A database on a disk that is full, or damaged."""

    def __init__(self, connection: sqlite3.Connection, error: type[Exception]) -> None:
        self._error = error
        self.close = connection.close

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...

    def execute(self, *_: object) -> None:
        raise self._error("no more of this")


def wait_until(is_so: Callable[[], bool]) -> None:
    until = time.monotonic() + 10.0
    while not is_so():
        assert time.monotonic() < until
        time.sleep(0.01)


async def test_a_keeper_that_is_stopped_at_any_moment_keeps_everything(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    first, store = dispatcher(), Store(path)
    keeper = Keeper(first, store)
    for number in range(300):
        serve(first, f"{number}", workflow=f"workflow {number}", final=True)
    keep = store.keep
    parts: list[str] = []

    def keep_and_stop(kind: str, value: Mapping[str, Any]) -> None:
        keep(kind, value)
        parts.append(kind)
        if len(parts) == 100:
            keeping.cancel()

    store.keep = keep_and_stop  # type: ignore[method-assign]
    keeping = asyncio.create_task(keeper.run())
    await asyncio.wait([keeping], timeout=10)
    store.close()

    assert learned(restored(path)) == learned(first)


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
