"""Calls that fail, hang or answer what they must not, and what becomes of the run."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from tests.text2sql.agents import BROKEN, OTHER, QUESTION, RIGHT, agent_for, by_sql, script
from tests.text2sql.scripted_server import Answer, Request
from vllm_workflow.text2sql.agent import NoCandidateError

pytestmark = pytest.mark.anyio


async def test_a_failed_call_drops_a_candidate_and_not_the_run(path: Path) -> None:
    async with agent_for(path, script(generate=[RIGHT, 400, RIGHT]), num_candidates=3) as (
        agent,
        _,
    ):
        answer = await agent.answer(QUESTION)

    assert len(answer.candidates) == 2
    (failed,) = [call for call in answer.calls if call.error]
    assert "scripted 400" in str(failed.error)


async def test_a_retried_call_is_one_call_with_two_attempts(path: Path) -> None:
    async with agent_for(path, script(generate=[503, RIGHT]), num_candidates=1) as (agent, _):
        answer = await agent.answer(QUESTION)

    assert [call.num_attempts for call in answer.calls] == [1, 2]
    assert answer.calls[1].error is None


@pytest.mark.parametrize("stage", ["keywords", "revise", "unit_tests", "evaluate"])
async def test_any_other_stage_may_fail(path: Path, stage: str) -> None:
    scripts: dict[str, Any] = {
        "generate": [OTHER, BROKEN, RIGHT],
        "revise": RIGHT,
        "unit_tests": '["The query should filter"]',
        "evaluate": lambda request: by_sql(request, RIGHT),
        stage: 500,
    }
    async with agent_for(path, script(**scripts), num_candidates=3) as (agent, _):
        answer = await agent.answer(QUESTION)

    assert answer.sql in (OTHER, RIGHT)
    assert [hit.value for hit in answer.hits] == ["Berlin"]
    assert {call.stage for call in answer.calls if call.error} == {stage}


async def test_the_error_says_why_there_is_no_candidate(path: Path) -> None:
    async with agent_for(path, script(generate=[500, 500, "no idea"] * 2), num_candidates=3) as (
        agent,
        _,
    ):
        with pytest.raises(NoCandidateError) as raised:
            await agent.answer(QUESTION, workflow_id="run-7")

    assert "run run-7: none of 3 calls of the stage generate gave SQL" in str(raised.value)
    assert "scripted 500" in str(raised.value)


async def test_a_call_that_hangs_is_given_up(path: Path) -> None:
    released = asyncio.Event()

    def answer(request: Request) -> Answer:
        return hanging(released) if request.stage == "keywords" else RIGHT

    async with agent_for(path, answer, timeout_s=0.4, num_candidates=1) as (agent, _):
        result = await agent.answer(QUESTION)
        released.set()

    assert result.sql == RIGHT
    assert "APITimeoutError" in str(result.calls[0].error)


def hanging(released: asyncio.Event) -> web.StreamResponse:
    class Hanging(web.Response):
        async def prepare(self, request: web.BaseRequest) -> Any:
            await released.wait()
            return await super().prepare(request)

    return Hanging()


@pytest.mark.parametrize(
    "body", ["", "not json", "[]", "{}", '{"choices": []}', '{"choices": null}']
)
async def test_an_answer_that_is_no_completion_is_a_failed_call(path: Path, body: str) -> None:
    def answer(request: Request) -> Answer:
        if request.stage == "keywords":
            return web.Response(text=body, content_type="application/json")
        return RIGHT

    async with agent_for(path, answer, num_candidates=1) as (agent, _):
        result = await agent.answer(QUESTION)

    assert result.sql == RIGHT
    assert result.calls[0].error


@pytest.mark.parametrize(
    "sql",
    [
        "DROP TABLE shop",
        "DELETE FROM shop",
        "SELECT 1; DELETE FROM shop",
        "WITH a AS (SELECT 1) DELETE FROM shop",
        "PRAGMA writable_schema = ON",
    ],
)
async def test_no_answer_of_a_model_changes_the_database(path: Path, sql: str) -> None:
    before = digest(path)
    fence = f"```sql\n{sql}\n```"
    async with agent_for(path, script(generate=[fence, RIGHT], revise=fence)) as (agent, _):
        answer = await agent.answer(QUESTION)

    assert answer.sql == RIGHT
    assert digest(path) == before


def digest(path: Path) -> bytes:
    return hashlib.sha256(path.read_bytes()).digest()
