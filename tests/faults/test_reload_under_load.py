"""A router whose file changes again and again while runs go through it."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.faults.load import Load, running
from tests.faults.processes import EngineProcess, engines
from vllm_workflow.core.events import Apportioned, Event, Swapped, from_json
from vllm_workflow.core.replay import replay
from vllm_workflow.router.app import Router, serve
from vllm_workflow.router.config import RouterConfig

pytestmark = pytest.mark.anyio

NUM_RUNS = 60
MAX_RUNS = 600
"""Not more, however slow the machine is."""


def configurations(found: list[EngineProcess], static: Path) -> list[dict[str, Any]]:
    """What the file says in turn: each differs from the one before in several ways."""
    a, b, c = ({"id": f"engine-{i}", "url": e.url, "models": ["m"]} for i, e in enumerate(found))
    by_name = {"name": "127.0.0.1", "port": found[2].port, "template": {"models": ["m"]}}
    quota = {"": {"max_concurrent_calls": 40}}
    return [
        {"instances": [a, b], "policy": "workflow"},
        {"instances": [a, b, c], "policy": "hexgen", "tenants": {"lag": 1.0}, "max_wait_s": 30},
        {"instances": [b, c], "policy": "round-robin", "set_priority": True},
        {
            "discovery": {"files": [{"path": str(static), "every_s": 0.05}]},
            "policy": "workflow",
            "tenants": {"named": quota},
        },
        {
            "discovery": {"files": [{"path": str(static)}], "dns": [by_name]},
            "policy": "least-outstanding+fcfs+late",
            "workflows": [{"name": "w", "stages": [{"name": "s", "output_tokens": 9}]}],
        },
        {"instances": [c | {"max_num_seqs": 4}], "policy": "workflow", "tenants": {}},
    ]


@asynccontextmanager
async def reloading(path: Path, contents: list[dict[str, Any]]) -> AsyncIterator[Router]:
    """Run a router from a file, and have it read the next of `contents` all the time."""

    def write(content: dict[str, Any]) -> None:
        fixed = {"port": 0, "decision_log": "decisions.jsonl", "shutdown_grace_s": 5}
        path.write_text(yaml.safe_dump(fixed | content), "utf-8")

    def read() -> RouterConfig:
        return RouterConfig.from_file(path)

    async def go_on() -> None:
        for content in itertools.cycle(contents[1:] + contents[:1]):
            write(content)
            await router.reload()

    write(contents[0])
    async with serve(read(), read) as router:
        task = asyncio.create_task(go_on())
        try:
            yield router
        finally:
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task


async def test_no_call_is_lost_however_often_the_file_changes(tmp_path: Path) -> None:
    log = tmp_path / "decisions.jsonl"
    async with asyncio.timeout(200), engines(tmp_path, 3) as found:
        static = tmp_path / "instances.yaml"
        listed = [{"id": f"engine-{i}", "url": e.url} for i, e in enumerate(found[:2])]
        static.write_text(yaml.safe_dump(listed), "utf-8")
        contents = configurations(found, static)
        async with reloading(tmp_path / "router.yaml", contents) as router:
            load = Load(url=router.url, num_calls=4, budget_s=None)
            for number in range(MAX_RUNS // NUM_RUNS):
                async with running(load, NUM_RUNS, prefix=f"run{number}"):
                    pass
                if router.metrics.registry.get_sample_value(
                    "vllm_workflow:router_policy_swaps_total"
                ) >= 2 * len(contents):
                    break

    tally = load.tally
    assert tally.statuses == Counter({200: 4 * tally.num_runs})
    assert tally.num_lost_runs == tally.num_truncated == tally.num_timeouts == 0
    assert tally.signalled == []
    events: list[Event] = [from_json(line) for line in log.read_bytes().splitlines()]
    kinds = Counter(type(event) for event in events)
    assert kinds[Swapped] > len(contents)
    assert kinds[Apportioned] > len(contents)
    assert all(then == now for then, now in replay(events))
