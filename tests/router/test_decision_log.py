"""The decision log as a file: what becomes of events that a disk does not take."""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress
from pathlib import Path

import pytest

from vllm_workflow.core.events import Marked, to_json
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
