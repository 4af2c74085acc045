"""What the router's process writes to its log."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.fakes import FakeEngine
from tests.router.conftest import CHAT

pytestmark = pytest.mark.anyio
SECRET = "the-prompt-nobody-should-see"


async def log_of_one_call(folder: Path, **config: Any) -> str:
    """Start a router's process, call it once, stop it; return what it wrote."""
    async with FakeEngine().serving() as engine:
        path = folder / "router.json"
        data = {"port": 0, "instances": [{"url": engine.url, "id": "a"}], **config}
        await asyncio.to_thread(path.write_text, json.dumps(data))
        command = (sys.executable, "-m", "vllm_workflow.cli.main", "router", "--config", str(path))
        process = await asyncio.create_subprocess_exec(
            *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
        assert process.stdout is not None
        line = (await process.stdout.readline()).decode()
        url = line.split()[3].rstrip(":")
        headers = {"X-Workflow-Id": "r1", "X-Workflow-Stage": "draft", "X-Tenant-Id": "acme"}
        body = {"model": "m", "messages": [{"role": "user", "content": SECRET}]}
        async with (
            aiohttp.ClientSession() as session,
            session.post(url + CHAT, json=body, headers=headers) as response,
        ):
            assert response.status == 200
        process.send_signal(signal.SIGTERM)
        _, written = await process.communicate()
    return written.decode()


async def test_each_call_is_an_object_with_fields(tmp_path: Path) -> None:
    written = await log_of_one_call(
        tmp_path, log_format="json", log_calls=True, log_level="warning"
    )

    lines = [json.loads(line) for line in written.splitlines()]
    (call,) = [line for line in lines if line["logger"] == "vllm_workflow.calls"]
    said = {name: call[name] for name in ("run", "stage", "tenant", "instance", "status", "model")}
    assert said == {
        "run": "r1",
        "stage": "draft",
        "tenant": "acme",
        "instance": "a",
        "status": 200,
        "model": "m",
    }
    assert call["seconds"] > 0.0
    assert call["time"]
    assert SECRET not in written


async def test_text_says_the_same_and_nothing_unless_asked(tmp_path: Path) -> None:
    told = await log_of_one_call(tmp_path, log_calls=True, log_level="warning")
    silent = await log_of_one_call(tmp_path)

    assert "run='r1'" in told
    assert "vllm_workflow.calls" not in silent
    assert SECRET not in told + silent
