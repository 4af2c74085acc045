"""The decision log as a file: what becomes of events that a disk does not take."""

from __future__ import annotations

import asyncio
import os
import shutil
from contextlib import suppress
from pathlib import Path

import pytest

from tests.fakes import FakeEngine
from tests.router.conftest import Routing
from vllm_workflow.core.events import Marked, to_json
from vllm_workflow.router import decision_log
from vllm_workflow.router.decision_log import MAX_WAITING, DecisionLog

pytestmark = pytest.mark.anyio
EVENT = Marked(instance_id="a", healthy=True)


async def test_a_disk_that_hangs_fills_no_memory(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A pipe that nobody reads stands for it."""
    path = tmp_path / "decisions.jsonl"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    log = DecisionLog(path)
    for _ in range(10_000):  # far more than a pipe holds
        log.record(EVENT)
    running = asyncio.create_task(log.run())
    while log._events:
        await asyncio.sleep(0.01)
    for _ in range(MAX_WAITING + 7):  # while they wait to be written
        log.record(EVENT)
    assert len(log._events) == MAX_WAITING

    received = 0
    line_bytes = len(to_json(EVENT)) + 1
    async with asyncio.timeout(30):
        while received < (10_000 + MAX_WAITING) * line_bytes:
            with suppress(BlockingIOError):
                received += len(os.read(reader, 1 << 20))
            await asyncio.sleep(0)
    running.cancel()
    await asyncio.wait([running])
    os.close(reader)

    assert received == (10_000 + MAX_WAITING) * line_bytes
    assert "dropped 7 events of the decision log" in caplog.text
    assert log.num_dropped == 7


async def test_what_a_full_disk_did_not_take_is_counted(
    routing: Routing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its folder goes away in its place."""
    monkeypatch.setattr(decision_log, "_FLUSH_S", 0.01)
    folder = tmp_path / "log"
    folder.mkdir()
    async with (
        FakeEngine().serving() as engine,
        routing(engine, decision_log=str(folder / "decisions.jsonl")) as client,
    ):
        assert await client.metric("decision_log_dropped_total") == 0
        shutil.rmtree(folder)
        async with client.post() as response:
            assert response.status == 200
        async with asyncio.timeout(5):
            # A call is submitted and settled.
            while (await client.metric("decision_log_dropped_total") or 0) < 2:
                await asyncio.sleep(0.01)
