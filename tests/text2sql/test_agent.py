"""The agent against a real socket; what the model says is scripted per stage."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest

from tests.text2sql.agents import BROKEN, EMPTY, OTHER, QUESTION, RIGHT, agent_for, by_sql, script
from tests.text2sql.scripted_server import Answer, Request, Server
from vllm_workflow.core.errors import ConfigError
from vllm_workflow.text2sql.agent import AgentOptions
from vllm_workflow.text2sql.full import FullPrompts
from vllm_workflow.text2sql.types import Executor, SqlCandidate, Status, Task

pytestmark = pytest.mark.anyio


async def test_candidates_that_agree_need_no_tests(path: Path) -> None:
    async with agent_for(path, script(), num_candidates=4) as (agent, server):
        answer = await agent.answer(QUESTION)

    assert answer.sql == RIGHT
    assert answer.execution.rows == ((2,),)
    assert [call.stage for call in answer.calls] == ["keywords"] + ["generate"] * 4
    assert [group.members for group in answer.clusters] == [(0, 1, 2, 3)]
    assert [request.stage for request in server.requests].count("generate") == 4


async def test_one_candidate_is_greedy_and_two_templates_take_turns(path: Path) -> None:
    options = {"num_candidates": 4, "temperature": 0.6}
    async with agent_for(path, script(), **options) as (agent, server):
        await agent.answer(QUESTION)

    bodies = sorted((r.body for r in server.of("generate")), key=lambda body: body["temperature"])
    assert [body["temperature"] for body in bodies] == [0.0, 0.6, 0.6, 0.6]
    systems = [body["messages"][0]["content"] for body in bodies]
    assert len(set(systems)) == 2
    assert systems.count(systems[0]) == 2


async def test_the_same_seed_sends_the_same_requests(path: Path) -> None:
    async with agent_for(path, script()) as (agent, server):
        for seed in (1, 1, 2):
            await agent.answer(QUESTION, seed=seed)

    seeds = [request.body["seed"] for request in server.of("generate")]
    once, again, other = (sorted(seeds[start : start + 6]) for start in (0, 6, 12))
    assert once == again
    assert len(set(once + other)) == 12


async def test_values_of_the_database_reach_the_generate_prompt(path: Path) -> None:
    async with agent_for(path, script()) as (agent, server):
        answer = await agent.answer(QUESTION, evidence="shops are rows of shop")

    assert [hit.value for hit in answer.hits] == ["Berlin"]
    assert "city.name = 'Berlin'" in server.of("generate")[0].prompt
    assert "shops are rows of shop" in server.of("generate")[0].prompt


async def test_a_failing_statement_is_corrected_with_what_sqlite_said(path: Path) -> None:
    scripts = script(generate=BROKEN, revise=f"```sql\n{RIGHT}\n```")
    async with agent_for(path, scripts) as (agent, server):
        answer = await agent.answer(QUESTION)

    assert answer.sql == RIGHT
    assert answer.num_revise_rounds == 1
    (revise,) = server.of("revise")
    assert "no such column: nam" in revise.prompt


async def test_an_empty_result_is_corrected(path: Path) -> None:
    async with agent_for(path, script(generate=EMPTY, revise=RIGHT)) as (agent, _):
        answer = await agent.answer(QUESTION)

    assert answer.sql == RIGHT


async def test_different_failures_are_corrected_in_parallel(path: Path) -> None:
    broken = [f"SELECT x{number} FROM city" for number in range(6)]
    async with agent_for(path, script(generate=broken, revise=RIGHT)) as (agent, server):
        answer = await agent.answer(QUESTION)

    calls = [call for call in answer.calls if call.stage == "revise"]
    assert len(calls) == len(server.of("revise")) == 6
    assert max(call.start_s for call in calls) < min(call.end_s for call in calls)


async def test_correction_stops_when_a_round_brings_nothing_new(path: Path) -> None:
    scripts = script(generate=BROKEN, revise=BROKEN)
    async with agent_for(path, scripts, max_revise_rounds=10) as (agent, server):
        answer = await agent.answer(QUESTION)

    assert len(server.of("revise")) == 1
    assert answer.execution.status is Status.ERROR


async def test_correction_stops_after_the_rounds_that_are_allowed(path: Path) -> None:
    def revise(request: Request) -> Answer:
        return f"SELECT wrong{request.number} FROM city"

    scripts = script(generate=BROKEN, revise=revise)
    async with agent_for(path, scripts, max_revise_rounds=4) as (agent, server):
        answer = await agent.answer(QUESTION)

    assert len(server.of("revise")) == answer.num_revise_rounds == 4


async def test_a_correction_that_does_worse_is_not_taken(path: Path) -> None:
    async with agent_for(path, script(generate=EMPTY, revise=BROKEN)) as (agent, _):
        answer = await agent.answer(QUESTION)

    assert (answer.sql, answer.execution.status) == (EMPTY, Status.EMPTY)


async def test_unit_tests_overrule_the_votes(path: Path) -> None:
    scripts = script(
        generate=[OTHER, OTHER, RIGHT],
        unit_tests='["The query should filter on Berlin", "The query should count"]',
        evaluate=lambda request: by_sql(request, RIGHT),
    )
    async with agent_for(path, scripts, num_candidates=3) as (agent, server):
        answer = await agent.answer(QUESTION)

    assert answer.sql == RIGHT
    assert len(server.of("unit_tests")) == 1
    assert len(server.of("evaluate")) == len(answer.tests) == 2
    assert all(call.headers["X-Workflow-Final"] == "true" for call in server.of("evaluate"))
    assert sorted(str(group.num_passed) for group in answer.clusters) == ["0", "2"]
    assert not any(test.by_machine for test in answer.tests)


class CheckedPrompts(FullPrompts):
    """A prompt set whose tests a machine decides, all but those that ask."""

    def check(self, task: Task, test: str, candidate: SqlCandidate, db: Executor) -> bool | None:
        return None if "?" in test else test in candidate.sql


async def test_tests_that_a_machine_decides_ask_no_model(path: Path) -> None:
    scripts = script(
        generate=[OTHER, OTHER, RIGHT], unit_tests='["Berlin", "right?"]', evaluate="nothing"
    )
    async with agent_for(path, scripts, num_candidates=3, prompts=CheckedPrompts()) as (
        agent,
        server,
    ):
        answer = await agent.answer(QUESTION)

    assert answer.sql == RIGHT
    assert [test.by_machine for test in answer.tests] == [True, False]
    (evaluate,) = server.of("evaluate")
    assert evaluate.headers["X-Workflow-Final"] == "true"


def finals(server: Server) -> list[tuple[str | None, bool]]:
    return [(r.stage, "X-Workflow-Final" in r.headers) for r in server.requests]


async def test_a_call_is_final_only_where_no_answer_to_it_can_make_another_call(
    path: Path,
) -> None:
    without_tests: dict[str, Any] = {"num_unit_tests": 0, "max_revise_rounds": 0}
    for options, scripts, last in (
        (without_tests, script(), ["generate"] * 6),
        ({"num_candidates": 1, "max_revise_rounds": 0}, script(), ["generate"]),
        (
            {"num_candidates": 1, "max_revise_rounds": 2},
            script(generate=BROKEN, revise=[f"{BROKEN} WHERE 1", RIGHT]),
            ["revise"],
        ),
        (
            {"num_candidates": 3, "max_revise_rounds": 1},
            script(generate=BROKEN, revise=RIGHT),
            ["revise"],
        ),
        # What comes next depends on the answers.
        ({"max_revise_rounds": 0}, script(), []),
        ({"num_candidates": 1, "max_revise_rounds": 2}, script(generate=BROKEN, revise=RIGHT), []),
        (
            {"num_candidates": 2, "max_revise_rounds": 1},
            script(generate=[BROKEN, OTHER], revise=RIGHT, unit_tests="[]"),
            [],
        ),
    ):
        async with agent_for(path, scripts, **options) as (agent, server):
            await agent.answer(QUESTION)
        told = finals(server)
        assert [stage for stage, final in told if final] == last, options
        assert all(final for _, final in told[len(told) - len(last) :])


async def test_rows_beat_an_error_without_any_test(path: Path) -> None:
    scripts = script(generate=[BROKEN, BROKEN, RIGHT], revise="no idea")
    async with agent_for(path, scripts, num_candidates=3) as (agent, server):
        answer = await agent.answer(QUESTION)

    assert answer.sql == RIGHT
    assert len(answer.clusters) == 2
    assert not server.of("unit_tests")


async def test_schema_selection_narrows_what_generate_sees(path: Path) -> None:
    scripts = script(select_schema='{"city": ["name"]}', generate="SELECT name FROM city")
    prompts = FullPrompts(min_columns_to_select=1)
    async with agent_for(path, scripts, prompts=prompts) as (agent, server):
        await agent.answer(QUESTION)

    assert len(server.of("select_schema")) == 1
    assert "CREATE TABLE shop" not in server.of("generate")[0].body["messages"][1]["content"]


async def test_the_timeline_says_where_each_call_ran(path: Path) -> None:
    said = {"X-Workflow-Instance": "a100-0", "X-Workflow-Slack-Ms": "1500"}
    async with agent_for(path, script(), response_headers=said) as (agent, server):
        start = time.monotonic()
        answer = await agent.answer(QUESTION, slo_s=30, tenant="acme", workflow_id="run-1")
        elapsed_s = time.monotonic() - start

    assert answer.num_calls == 7
    for call in answer.calls:
        assert (call.instance, call.slack_ms) == ("a100-0", 1500.0)
        assert (call.num_prompt_tokens, call.num_output_tokens) == (7, 3)
        assert 0 <= call.start_s <= call.end_s <= answer.latency_s <= elapsed_s
    assert answer.deadline_met is True
    assert {request.headers["X-Workflow-Id"] for request in server.requests} == {"run-1"}
    assert {request.headers["X-Tenant-Id"] for request in server.requests} == {"acme"}


async def test_a_late_run_still_answers(path: Path) -> None:
    async with agent_for(path, script(), num_candidates=1) as (agent, _):
        answer = await agent.answer(QUESTION, slo_s=0.0001)

    assert answer.sql == RIGHT
    assert answer.deadline_met is False


async def test_runs_in_flight_at_once_do_not_mix(path: Path) -> None:
    async with agent_for(path, script(), num_candidates=2) as (agent, server):
        answers = await asyncio.gather(
            *(agent.answer(QUESTION, workflow_id=f"run-{n}") for n in range(8))
        )

    assert [answer.num_calls for answer in answers] == [3] * 8
    for number in range(8):
        ids = [r for r in server.requests if r.headers["X-Workflow-Id"] == f"run-{number}"]
        assert len(ids) == 3


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_candidates", 0), ("max_revise_rounds", 11), ("temperature", -1), ("max_tokens", 0)],
)
def test_options_out_of_range_are_named(field: str, value: int) -> None:
    with pytest.raises(ConfigError, match=field):
        AgentOptions(**{field: value})  # type: ignore[arg-type]
