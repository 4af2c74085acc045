"""Agents of a scripted model."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from openai import AsyncOpenAI

from tests.text2sql.scripted_server import Answer, Request, Server, serving
from vllm_workflow.text2sql.agent import AgentOptions, Text2SqlAgent
from vllm_workflow.text2sql.database import Database
from vllm_workflow.text2sql.full import FullPrompts

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


def by_sql(request: Request, passing: str) -> str:
    """Let the candidate with the SQL `passing` pass, and all others fail."""
    lines = []
    shown = request.body["messages"][1]["content"].split("\n\nCandidate ")[1:]
    for number, part in enumerate(shown, 1):
        verdict = "Passed" if part.split("\n")[1] == passing else "Failed"
        lines.append(f"Candidate {number}: [{verdict}]")
    return "\n".join(lines)
