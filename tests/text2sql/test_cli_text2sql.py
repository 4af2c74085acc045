"""`vllm-workflow text2sql` as a user runs it: a process against a server on a socket."""

from __future__ import annotations

import asyncio
import json
import random
import sys
from collections.abc import AsyncIterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from openai import AsyncOpenAI

from tests.text2sql.builders import execution, make_database
from tests.text2sql.scripted_server import Answer, Request, Server, serving
from vllm_workflow.cli.main import main
from vllm_workflow.core.errors import ConfigError
from vllm_workflow.text2sql.agent import AgentOptions, Text2SqlAgent
from vllm_workflow.text2sql.database import Database
from vllm_workflow.text2sql.full import FullPrompts
from vllm_workflow.text2sql.report import rows_table
from vllm_workflow.text2sql.runner import Question, load_questions, run_questions, summary
from vllm_workflow.text2sql.types import Status

pytestmark = pytest.mark.anyio

SQL = "SELECT name FROM city WHERE country = 'UK'"


def answer(request: Request) -> Answer:
    if "fail" in request.prompt.rpartition("Question:")[2]:
        return 400
    return '["UK"]' if request.stage == "keywords" else SQL


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return make_database(tmp_path / "shops.sqlite")


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    async with serving(answer, response_headers={"X-Workflow-Instance": "a100-0"}) as server:
        yield server


async def command(*arguments: object) -> tuple[int | None, str, str]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "vllm_workflow.cli.main", "text2sql"),
        *map(str, arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    return process.returncode, out.decode(), err.decode()


async def test_ask_prints_sql_rows_and_timeline(path: Path, server: Server) -> None:
    status, out, err = await command(
        *("ask", "--db", path, "--base-url", server.base_url, "--slo-s", 30),
        *("--num-candidates", 3, "Which cities are in the UK?"),
    )

    assert (status, err) == (0, "")
    assert out.startswith(SQL)
    assert "York\n(1 row)" in out
    assert out.count("generate |") == 3
    assert "on a100-0" in out
    assert "s of 30 s: deadline met" in out
    assert {request.body["model"] for request in server.requests} == {"scripted"}
    assert {request.headers["X-Workflow-Slo-Ms"] for request in server.requests} == {"30000"}


async def test_run_writes_what_became_of_every_question(
    path: Path, server: Server, tmp_path: Path
) -> None:
    questions = tmp_path / "questions.jsonl"
    lines = [
        {"question": "Which cities are in the UK?", "id": "uk", "sql": SQL},
        {"question": "Which cities are not?", "sql": "SELECT name FROM city WHERE country = 'US'"},
        {"question": "Which calls fail?", "sql": SQL},
        {"question": "Any city?"},
        {"question": "Is the gold wrong?", "sql": "SELECT nope"},
    ]
    questions.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    output = tmp_path / "out.json"

    status, out, err = await command(
        *("run", "--db", path, "--base-url", server.base_url, "--questions", questions),
        *("--output", output, "--slo-s", 60, "--max-concurrency", 2, "--num-candidates", 2),
    )

    document = json.loads(output.read_text(encoding="utf-8"))
    runs = document["runs"]
    assert status == 1
    assert "5/5" in err
    assert "scripted 400" in err
    assert [run["id"] for run in runs] == ["uk", "2", "3", "4", "5"]
    assert [run["correct"] for run in runs] == [True, False, False, None, None]
    assert [run["status"] for run in runs] == ["ok", "ok", "failed", "ok", "ok"]
    assert [run["deadline_met"] for run in runs] == [True, True, False, True, True]
    assert "gold SQL gave error" in runs[4]["error"]
    assert runs[0]["sql"] == SQL
    assert [call["stage"] for call in runs[0]["timeline"]] == ["keywords", "generate", "generate"]
    assert document["execution_accuracy"] == pytest.approx(1 / 3)
    assert document["failed_workflows"] == 1
    assert document["conditions"]["agent"]["num_candidates"] == 2
    assert "slo_attainment" in out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["ask", "--db", "nowhere.sqlite", "q"], "nowhere.sqlite: nothing there"),
        (["ask", "--db", "DB", "--base-url", "http://127.0.0.1:9/v1", "q"], "127.0.0.1:9"),
        (["ask", "--db", "DB", "--num-candidates", "0", "q"], "num_candidates: wanted 1 to 100"),
        (["ask", "--db", "DB", "--slo-s", "-1", "q"], "wanted a positive number"),
        (["ask", "--db", "DB", "--tenant", "a\nb", "q"], "wanted printable ASCII"),
        (["run", "--db", "DB", "--questions", "nowhere.jsonl"], "nowhere.jsonl: cannot be read"),
    ],
)
def test_a_mistake_is_one_clear_line(
    path: Path, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(path) if word == "DB" else word for word in arguments]
    try:
        status: int | str | None = main(["text2sql", *words])
    except SystemExit as left:
        status = left.code

    out, err = capsys.readouterr()
    assert (status, out) == (2, "")
    assert says in err
    assert "Traceback" not in err


@pytest.mark.parametrize("action", ["ask", "run"])
def test_help_explains_every_option(action: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["text2sql", action, "--help"])

    assert "promise for the whole run" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", ":2: not JSON"),
        ("[1]", ":2: wanted a JSON object"),
        ('{"sql": "x"}', ":2: field 'question'"),
        ('{"question": 1}', ":2: field 'question': wanted a string, got 1"),
        ('{"question": "x", "sql": []}', ":2: field 'sql'"),
        ('{"question": "x", "gold": "y"}', ":2: unknown field 'gold'"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, says: str) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text('{"question": "fine"}\n' + line, encoding="utf-8")

    with pytest.raises(ConfigError) as raised:
        load_questions(path)

    assert f"{path}{says}" in str(raised.value)


def test_questions_get_ids_and_empty_lines_do_not_count(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text('{"question": "a"}\n\n{"question": "b", "id": 7}\n', encoding="utf-8")

    assert load_questions(path) == [Question(id="1", question="a"), Question(id="7", question="b")]


def test_a_file_without_questions_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text("\n", encoding="utf-8")

    with pytest.raises(ConfigError, match="got no lines"):
        load_questions(path)


async def runs_of(path: Path, server: Server, count: int, **options: Any) -> list[Any]:
    questions = [Question(id=str(number), question="Where?") for number in range(count)]
    async with AsyncOpenAI(base_url=server.base_url, api_key="none") as client:
        agent = Text2SqlAgent(
            client,
            Database(path),
            FullPrompts(),
            model="scripted",
            options=AgentOptions(num_candidates=1),
        )
        return await run_questions(agent, questions, **options)


async def test_runs_arrive_as_the_seed_says(path: Path, server: Server) -> None:
    records = await runs_of(path, server, 5, request_rate=40.0, seed=3)

    rng = random.Random(3)
    planned = [0.0]
    for _ in range(4):
        planned.append(planned[-1] + rng.expovariate(40.0))
    for record, arrival_s in zip(records, planned, strict=True):
        assert record.arrival_s >= arrival_s


async def test_no_more_runs_are_in_flight_than_allowed(path: Path, server: Server) -> None:
    records = await runs_of(path, server, 4, max_concurrency=1, slo_s=60)

    spans = sorted(
        (r.arrival_s + r.client_queue_s, r.arrival_s + r.client_queue_s + r.latency_s)
        for r in records
    )
    for (_, end), (start, _) in pairwise(spans):
        assert start >= end - 0.005
    assert summary(records)["slo_attainment"] == 1.0


def test_a_summary_of_nothing_has_no_rates() -> None:
    totals = summary([])

    assert totals["num_workflows"] == 0
    assert totals["execution_accuracy"] is totals["p95_workflow_latency_ms"] is None


def test_a_table_is_aligned_and_safe_to_print() -> None:
    done = execution(("a\x1b[31m\nb", None), ("x" * 99, b"12"))

    lines = rows_table(done).splitlines()

    assert lines[0].split() == ["c0", "|", "c1"]
    assert "\x1b" not in rows_table(done)
    assert "NULL" in lines[2]
    assert "<2 bytes>" in lines[3]
    assert lines[-1] == "(2 rows)"
    assert rows_table(execution(status=Status.ERROR, message="no such table")) == (
        "error: no such table"
    )
    assert len(lines[1]) == 40 + 3 + 9
