"""The live page, over HTTP and in a browser."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from tests.fakes import FakeEngine
from tests.router.conftest import Client, Routing
from vllm_workflow.router import board, runs

pytestmark = pytest.mark.anyio
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
NUM_RUNS = 1_000


async def run_of_calls(client: Client, name: str, num_calls: int, tenant: str) -> None:
    for number in range(num_calls):
        headers = {
            "X-Workflow-Id": name,
            "X-Workflow-Name": "report",
            "X-Workflow-Stage": f"stage-{number}",
            "X-Workflow-Slo-Ms": "60000",
            "X-Tenant-Id": tenant,
            "X-Workflow-Final": str(number == num_calls - 1).lower(),
        }
        async with client.post(headers=headers) as response:
            assert response.status == 200


async def test_the_page_brings_all_it_needs_and_lets_nothing_else_in(routing: Routing) -> None:
    async with FakeEngine().serving() as engine, routing(engine) as client:
        async with client.get("/dashboard") as response:
            page = await response.text()
            policy = response.headers["Content-Security-Policy"]

    (nonce,) = set(re.findall(r'nonce="([^"]+)"', page))
    assert f"script-src 'nonce-{nonce}'" in policy
    assert "default-src 'none'" in policy
    assert not re.findall(r"""(?:src|href)\s*=|@import|url\(|https?://""", page)
    assert "{{" not in page


async def test_its_data_says_what_goes_on(routing: Routing) -> None:
    async with FakeEngine().serving() as engine, routing(engine) as client:
        await run_of_calls(client, "r", 2, "acme")
        async with client.get("/dashboard/state") as response:
            state = await response.json()
        async with client.get(f"/dashboard/state?since={state['number']}") as response:
            news = await response.json()

    assert state["policy"]["name"] == "workflow"
    assert state["policy"]["fingerprint"] == client.router.dispatcher.config.fingerprint
    assert [each["id"] for each in state["instances"]] == ["a"]
    assert state["tenants"] == [{"tenant": "acme", "running": 0, "met": 1, "missed": 0}]
    assert [[call[0] for call in run["calls"]] for run in state["runs"]] == [["stage-0", "stage-1"]]
    assert news["runs"] == []


@pytest.mark.parametrize("well", [True, False])
async def test_a_call_without_a_run_counts_once_and_at_once_as_in_the_metrics(
    routing: Routing, well: bool
) -> None:
    other = FakeEngine() if well else FakeEngine(status=500)
    async with (
        FakeEngine(status=500).serving() as bad,
        other.serving(),
        routing(bad, other) as client,
    ):
        for _ in range(4):  # some of them on the bad one first
            async with client.post(headers={"X-Workflow-Slo-Ms": "60000"}) as response:
                assert (response.status == 200) is well
        async with client.get("/dashboard/state") as response:
            state = await response.json()
        counted = {
            outcome: await client.metric("runs_total", workflow="", outcome=outcome) or 0
            for outcome in ("met", "missed")
        }

    assert bad.received
    assert state["tenants"] == [{"tenant": "", "running": 0, **counted}]
    assert counted == ({"met": 4, "missed": 0} if well else {"met": 0, "missed": 4})
    assert [run["met"] for run in state["runs"]] == [well] * 4
    num_calls = sum(run["num_calls"] for run in state["runs"])
    assert num_calls == len(bad.received) + len(other.received)


@pytest.mark.parametrize("run", ["", "r"])
async def test_a_call_that_reaches_no_instance_waits_and_is_missed_as_in_the_metrics(
    routing: Routing, run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "IDLE_S", 0.0)
    headers = {"X-Workflow-Slo-Ms": "1500"} | ({"X-Workflow-Id": run} if run else {})
    async with FakeEngine(health=500).serving() as engine, routing(engine) as client:

        async def state() -> dict[str, Any]:
            async with client.get("/dashboard/state") as response:
                return dict(await response.json())

        async def status() -> int:
            async with client.post(headers=headers) as response:
                return int(response.status)

        asking = asyncio.create_task(status())
        while not await client.metric("requests_waiting"):
            await asyncio.sleep(0.01)
        waiting = await state()
        assert await asking == 503
        await asyncio.sleep(board.REFRESH_S)
        client.router.proxy.runs.expire(time.monotonic() + 2.0)
        ended = await state()
        missed = await client.metric("runs_total", workflow="", outcome="missed")

    assert engine.received == []
    assert (waiting["num_waiting"], len(waiting["waiting"])) == (1, 1)
    assert waiting["tenants"] == [{"tenant": "", "running": 1, "met": 0, "missed": 0}]
    assert (ended["num_waiting"], ended["waiting"], missed) == (0, [], 1)
    assert ended["tenants"] == [{"tenant": "", "running": 0, "met": 0, "missed": 1}]
    assert [call[4:] for call in ended["runs"][0]["calls"]] == [["", False]]


@pytest.mark.parametrize("since", ["", "-1", "1.5", "nan", "9" * 30, "%F0"])
async def test_a_number_that_is_none_is_refused(routing: Routing, since: str) -> None:
    async with FakeEngine().serving() as engine, routing(engine) as client:
        async with client.get(f"/dashboard/state?since={since}") as response:
            answer = await response.json()

    assert response.status == 400
    assert "since: expected an integer from 0" in answer["error"]["message"]


async def test_it_can_be_switched_off(routing: Routing) -> None:
    async with FakeEngine().serving() as engine, routing(engine, dashboard=False) as client:
        for path in ("/dashboard", "/dashboard/state"):
            async with client.get(path) as response:
                assert response.status == 404


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
async def test_a_browser_shows_a_thousand_runs(routing: Routing, tmp_path: Path) -> None:
    # A name that would be a script if it were taken for anything but text.
    hostile = "<img src=x onerror=document.title='taken'>"
    async with (
        FakeEngine().serving() as fast,
        FakeEngine().serving() as slow,
        routing(fast, slow, within_s=90.0) as client,
    ):
        names = [f"run-{number:04}" for number in range(NUM_RUNS - 1)]
        for begin in range(0, len(names), 50):
            async with asyncio.TaskGroup() as group:
                for name in names[begin : begin + 50]:
                    group.create_task(run_of_calls(client, name, 2, f"tenant-{int(name[-1]) % 3}"))
        await run_of_calls(client, hostile, 2, "tenant-0")
        shown = await browse(f"{client.router.url}/dashboard", tmp_path)

    assert f'data-runs="{NUM_RUNS}"' in shown
    assert f"{NUM_RUNS} runs, 0 calls in flight, 0 waiting" in shown
    assert len(re.findall(r">100\.0 %<", shown)) == 3
    assert "<title>vllm-workflow</title>" in shown
    screenshot = tmp_path / "dashboard.png"
    assert screenshot.stat().st_size > 10_000
    if kept := os.environ.get("SCREENSHOTS"):
        shutil.copy(screenshot, kept)


async def browse(url: str, folder: Path) -> str:
    """Return what a page has become after a few seconds; leaves `dashboard.png`."""
    assert CHROMIUM is not None
    with tempfile.TemporaryDirectory() as profile:
        command = [
            *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic"),
            *("--no-first-run", "--disable-background-networking", "--disable-component-update"),
            *("--disable-sync", f"--user-data-dir={profile}", "--window-size=1400,1000"),
            *("--virtual-time-budget=4000", "--timeout=8000"),
            *(f"--screenshot={folder / 'dashboard.png'}", "--dump-dom", url),
        ]
        process = await asyncio.create_subprocess_exec(
            *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
        )
        try:
            out, _ = await asyncio.wait_for(process.communicate(), 60)
        finally:
            if process.returncode is None:
                process.kill()
    return out.decode()
