"""The agent against a real socket; what the model says is scripted per stage."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from openai import AsyncOpenAI

from tests.text2sql.builders import candidate, make_database
from tests.text2sql.scripted_server import Answer, Request, Server, serving
from vllm_workflow.core.errors import ConfigError
from vllm_workflow.text2sql.agent import AgentOptions, NoCandidateError, Text2SqlAgent
from vllm_workflow.text2sql.answer import Cluster
from vllm_workflow.text2sql.database import Database
from vllm_workflow.text2sql.full import FullPrompts
from vllm_workflow.text2sql.selection import choose, cluster, contenders
from vllm_workflow.text2sql.types import Executor, SqlCandidate, Status, Task

pytestmark = pytest.mark.anyio

QUESTION = "How many shops are in Berlin?"
RIGHT = "SELECT count(*) FROM shop JOIN city ON city.id = city_id WHERE city.name = 'Berlin'"
OTHER = "SELECT count(*) FROM shop"
EMPTY = "SELECT name FROM city WHERE name = 'Atlantis'"
BROKEN = "SELECT nam FROM city"

Scripts = dict[str, Callable[[Request], Answer] | list[Answer] | Answer]


def script(**stages: Any) -> Callable[[Request], Answer]:
    """Answer each stage with a text, with texts by number of the call, or with a function."""
    defaults: Scripts = {"keywords": '["Berlin"]', "generate": RIGHT}
    scripts = {**defaults, **stages}

    def answer(request: Request) -> Answer:
        given = scripts[str(request.stage)]
        if callable(given):
            return given(request)
        return given[request.number % len(given)] if isinstance(given, list) else given

    return answer


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_database(tmp_path_factory.mktemp("db") / "shops.sqlite")


@asynccontextmanager
async def agent_for(
    path: Path,
    answer: Callable[[Request], Answer],
    *,
    prompts: FullPrompts | None = None,
    response_headers: dict[str, str] | None = None,
    timeout_s: float = 10.0,
    **options: Any,
) -> AsyncIterator[tuple[Text2SqlAgent, Server]]:
    async with serving(answer, response_headers=response_headers) as server:
        async with AsyncOpenAI(
            base_url=server.base_url, api_key="none", timeout=timeout_s, max_retries=1
        ) as client:
            agent = Text2SqlAgent(
                client,
                Database(path),
                prompts or FullPrompts(),
                model="scripted",
                options=AgentOptions(**options),
            )
            yield agent, server


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


def by_sql(request: Request, passing: str) -> str:
    """Let the candidate with the SQL `passing` pass, and all others fail."""
    lines = []
    shown = request.body["messages"][1]["content"].split("\n\nCandidate ")[1:]
    for number, part in enumerate(shown, 1):
        verdict = "Passed" if part.split("\n")[1] == passing else "Failed"
        lines.append(f"Candidate {number}: [{verdict}]")
    return "\n".join(lines)


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


def test_clusters_ignore_row_order_unless_the_statement_orders() -> None:
    found = cluster(
        [
            candidate((1,), (2,), sql="SELECT a FROM t"),
            candidate((2,), (1,), sql="SELECT a FROM t WHERE b"),
            candidate((2,), (1,), sql="SELECT a FROM t ORDER BY a DESC"),
        ]
    )
    assert [group.members for group in found] == [(0, 1), (2,)]


def test_only_the_best_clusters_contend_and_the_largest_if_there_are_many() -> None:
    candidates = [candidate((1,)), candidate(), candidate((2,)), candidate((2,)), candidate((3,))]
    clusters = cluster(candidates)

    assert contenders(clusters, candidates, limit=9) == (0, 2, 3)
    assert contenders(clusters, candidates, limit=2) == (0, 2)


def test_the_choice_prefers_rows_then_tests_then_votes_then_the_first() -> None:
    candidates = [candidate(), candidate((1,)), candidate((2,)), candidate((3,)), candidate((3,))]
    empty, one, two, three = (
        Cluster(members=(0,), num_passed=9),
        Cluster(members=(1,), num_passed=1),
        Cluster(members=(2,), num_passed=1),
        Cluster(members=(3, 4), num_passed=1),
    )

    assert choose([empty, one], candidates) == 1
    assert choose([two, one], candidates) == 2
    assert choose([one, two, three], candidates) == 3
    assert choose([Cluster(members=(1,), num_passed=2), three], candidates) == 1
