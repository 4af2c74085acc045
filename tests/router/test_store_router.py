"""A router with a store: what it keeps of its calls."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.fakes import FakeEngine
from tests.router.conftest import Routing
from vllm_workflow.cli.main import main
from vllm_workflow.core.errors import ConfigError
from vllm_workflow.core.events import from_json
from vllm_workflow.core.replay import replay
from vllm_workflow.router.config import RouterConfig
from vllm_workflow.router.store import StoreReader

pytestmark = pytest.mark.anyio


async def test_its_events_can_be_replayed(routing: Routing, tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    async with (
        FakeEngine().serving() as one,
        FakeEngine().serving() as two,
        routing(one, two, store={"path": str(path)}) as client,
    ):
        for number in range(6):
            async with client.post(headers={"X-Workflow-Id": f"run-{number}"}) as response:
                assert response.status == 200

    with StoreReader(path) as reader:
        events = [from_json(line) for line in reader.events()]
    decisions = list(replay(events))

    assert len([before for before, _ in decisions if before is not None]) == 6
    assert all(before == now for before, now in decisions)


async def test_what_each_tenant_has_used_is_counted(
    routing: Routing, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "state.db"
    async with (
        FakeEngine().serving() as engine,
        routing(engine, store={"path": str(path), "max_events": 0}) as client,
    ):
        for tenant in ("acme", "acme", "bolt"):
            async with client.post(headers={"X-Tenant-Id": tenant}) as response:
                assert response.status == 200
        engine.status = 400
        async with client.post(headers={"X-Tenant-Id": "bolt"}) as response:
            assert response.status == 400
        written = "vllm_workflow:router_store_written_total"
        assert client.router.metrics.registry.get_sample_value(written) is not None

    assert main(["store", str(path), "usage"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    said = {
        row["tenant"]: (row["calls"], row["prompt_tokens"], row["output_tokens"]) for row in rows
    }
    assert said == {"acme": (2, 200, 6), "bolt": (1, 100, 3)}
    assert main(["store", str(path), "events"]) == 0
    assert capsys.readouterr().out == ""


async def test_a_router_starts_with_a_store_that_cannot_be_used(
    routing: Routing, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "state.db"
    path.write_text("no database")
    async with (
        FakeEngine().serving() as engine,
        routing(engine, store={"path": str(path)}) as client,
        client.post() as response,
    ):
        assert response.status == 200

    assert "cannot be used" in caplog.text
    assert "moved to" in caplog.text


def test_the_path_is_relative_to_the_configuration(tmp_path: Path) -> None:
    path = tmp_path / "router.yaml"
    path.write_text("instances: [{url: 'http://a:1'}]\nstore: {path: state.db}\n")

    config = RouterConfig.from_file(path)

    assert config.store is not None
    assert config.store.path == str(tmp_path / "state.db")


def test_an_unknown_field_is_named() -> None:
    data = {"instances": [{"url": "http://a:1"}], "store": {"path": "a", "days": 3}}

    with pytest.raises(ConfigError, match=r"store\.days"):
        RouterConfig.from_mapping(data, source="test")


def test_the_command_says_when_a_file_is_no_store(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["store", str(tmp_path / "none.db"), "usage"]) == 2
    assert "cannot read store: no such file" in capsys.readouterr().err
