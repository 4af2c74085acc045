"""Runs that come faster than the instances can keep their promises."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.fakes import FakeEngine
from tests.router.conftest import Client, Routing
from tests.text2sql.builders import make_database
from vllm_workflow.client import attach
from vllm_workflow.text2sql.agent import Text2SqlAgent
from vllm_workflow.text2sql.compact import CompactPrompts
from vllm_workflow.text2sql.database import Database
from vllm_workflow.text2sql.runner import Question, run_questions, summary

pytestmark = pytest.mark.anyio

REJECTING: dict[str, Any] = {
    "late_binding": True,
    "relegate": True,
    "admission": "reject",
    "max_hold_share": 0.0,
}
SLO_MS = "1200"
"""Half as much again as one of these calls needs, by the default latency model."""


async def begin(client: Client, number: int, answers: list[tuple[int, Any, Any]]) -> None:
    headers = {"X-Workflow-Id": f"run-{number}", "X-Workflow-Slo-Ms": SLO_MS}
    async with client.post(headers=headers) as response:
        answers.append((response.status, await response.json(), response.headers))


async def crowd(
    client: Client,
    engine: FakeEngine,
    tasks: asyncio.TaskGroup,
    answers: list[tuple[int, Any, Any]],
) -> int:
    """Let runs begin until one is refused; returns how many."""
    num_runs = 0
    while not answers:
        assert num_runs < 90, "no run is refused"
        tasks.create_task(begin(client, num_runs, answers))
        num_runs += 1
        async with asyncio.timeout(5):
            while len(engine.received) + len(answers) < num_runs:
                await asyncio.sleep(0.002)
    return num_runs


async def test_a_run_that_would_begin_too_late_is_told_when_to_come_again(
    routing: Routing,
) -> None:
    answers: list[tuple[int, Any, Any]] = []
    async with (
        FakeEngine(held=True).serving() as engine,
        routing(engine, seats=500, policy=REJECTING) as client,
        asyncio.TaskGroup() as tasks,
    ):
        num_runs = await crowd(client, engine, tasks, answers)
        under_way = {"X-Workflow-Id": "run-0", "X-Workflow-Slo-Ms": SLO_MS}
        again = tasks.create_task(_status(client, under_way))
        ordinary = tasks.create_task(_status(client, {}))
        await engine.wait_for(received=num_runs + 1)
        assert await client.metric("runs_refused_total", workflow="") == 1.0
        assert await client.metric("requests_held") == 0.0

        engine.release(num_runs + 1)
    status, body, headers = answers[0]
    assert status == 503
    assert int(headers["Retry-After"]) >= 1
    assert headers["X-Workflow-Refused"] == "overloaded"
    assert body["error"]["code"] == "overloaded"
    assert "wait to begin" in body["error"]["message"]
    assert [again.result(), ordinary.result()] == [200, 200]


async def test_a_workflow_that_is_refused_is_told_so_by_the_client_library(
    routing: Routing, tmp_path: Path
) -> None:
    database = make_database(tmp_path / "db.sqlite")
    async with (
        FakeEngine(held=True).serving() as engine,
        routing(engine, seats=500, policy=REJECTING) as client,
        attach(openai.AsyncOpenAI(base_url=client.router.url + "/v1", api_key="k")) as user,
        asyncio.TaskGroup() as tasks,
    ):
        answers: list[tuple[int, Any, Any]] = []
        num_runs = await crowd(client, engine, tasks, answers)
        agent = Text2SqlAgent(
            user.with_options(max_retries=0), Database(database), CompactPrompts(), model="m"
        )
        questions = [Question(id=str(i), question="Which cities?") for i in range(2)]
        records = await run_questions(agent, questions, slo_s=float(SLO_MS) / 1e3)
        engine.release(num_runs)

    assert [record.status for record in records] == ["rejected", "rejected"]
    assert [record.deadline_met for record in records] == [False, False]
    totals = summary(records)
    assert (totals["rejected_workflows"], totals["failed_workflows"]) == (2, 0)
    assert totals["slo_attainment"] == 0.0
    assert "come again in" in (records[0].error or "")


async def _status(client: Client, headers: dict[str, str]) -> int:
    async with client.post(headers=headers) as response:
        await response.read()
        return int(response.status)
