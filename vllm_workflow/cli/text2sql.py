"""`vllm-workflow text2sql`: ask one question, or run a file of them."""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import openai
from openai import AsyncOpenAI
from tqdm import tqdm

from vllm_workflow.client import workflow
from vllm_workflow.core.errors import ConfigError, UpstreamError
from vllm_workflow.text2sql.agent import WORKFLOW_NAME, AgentOptions, Text2SqlAgent
from vllm_workflow.text2sql.compact import CompactPrompts
from vllm_workflow.text2sql.database import Database
from vllm_workflow.text2sql.full import FullPrompts
from vllm_workflow.text2sql.report import rows_table, summary_lines, timeline_chart
from vllm_workflow.text2sql.runner import RunRecord, load_questions, run_questions, summary
from vllm_workflow.text2sql.types import PromptSet

_DEFAULTS = {field.name: field.default for field in fields(AgentOptions)}
_MAX_TOKENS = {"full": 1024, "compact": 256}

_DESCRIPTION = """\
Answers questions about a SQLite file. For each question a language model is called some ten to
thirty times: it picks keywords, writes several candidate queries, corrects those that fail, and
tests candidates that disagree. Every call tells the server which run and stage it belongs to and
how much time the run has left, so that the router can make whole runs meet their deadline.
The database is only ever read."""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `text2sql` with its actions `ask` and `run`."""
    parser = commands.add_parser(
        "text2sql",
        help="answer questions about a SQLite file by a multi-stage workflow",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    ask = actions.add_parser(
        "ask",
        help="answer one question and show how",
        description="Print the chosen SQL, its rows, and when each call of the run ran and where.",
    )
    ask.add_argument("question", help="the question, in quotes")
    ask.add_argument(
        "--evidence", default="", help="text that helps to read the question (default: none)"
    )
    _add_common(ask)
    ask.set_defaults(run=_run_ask)
    many = actions.add_parser(
        "run",
        help="answer a file of questions and measure",
        description="Answer every question of a file; print a summary, optionally write JSON. "
        "The exit status is 1 if a run failed.",
    )
    _add_many(many)
    _add_common(many)
    many.set_defaults(run=_run_many)


def _add_many(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--questions",
        required=True,
        metavar="FILE.jsonl",
        help='one JSON object per line: {"question": ..., and optionally "id", "evidence", and '
        '"sql", the right query, to count how many answers give the same rows}',
    )
    parser.add_argument(
        "--request-rate",
        type=_positive,
        default=math.inf,
        metavar="PER_S",
        help="runs that arrive per second, at random as a Poisson process; inf: all at once "
        "(default: inf)",
    )
    parser.add_argument(
        "--max-concurrency",
        type=_count,
        metavar="N",
        help="most runs in flight; later ones wait here, and their time counts from when they "
        "are let in (default: no limit)",
    )
    parser.add_argument(
        "--num-workflows",
        type=_count,
        metavar="N",
        help="ask only the first N questions (default: all)",
    )
    parser.add_argument("--output", metavar="FILE.json", help="write every run and its calls here")
    parser.add_argument("--disable-tqdm", action="store_true", help="no progress bar")


def _add_common(parser: argparse.ArgumentParser) -> None:
    server = parser.add_argument_group("server")
    server.add_argument("--db", required=True, metavar="FILE", help="the SQLite file to ask about")
    server.add_argument(
        "--base-url",
        default="http://127.0.0.1:8000/v1",
        metavar="URL",
        help="the router, a vLLM server or any OpenAI-compatible endpoint (default: %(default)s, "
        "a vLLM server's own port; the router's is 8080). "
        "Its key, if it wants one, is read from the environment variable OPENAI_API_KEY",
    )
    server.add_argument("--model", help="model name (default: the first of the server's /models)")
    server.add_argument(
        "--timeout-s",
        type=_seconds,
        default=600.0,
        metavar="S",
        help="give a single call up after this many seconds (default: %(default)s)",
    )
    server.add_argument(
        "--slo-s",
        type=_seconds,
        metavar="S",
        help="promise for the whole run, in seconds from its start. It is sent along so that the "
        "server can keep it; a run that is late still ends with its answer (default: no promise)",
    )
    server.add_argument(
        "--tenant", type=_tenant, help="who the runs are billed to (default: nobody)"
    )
    _add_agent(parser.add_argument_group("agent"))


def _add_agent(agent: argparse._ArgumentGroup) -> None:
    agent.add_argument(
        "--prompts",
        choices=sorted(_MAX_TOKENS),
        default="full",
        help="full: for any instruct model; compact: for the small model of the shop example "
        "(default: %(default)s)",
    )
    numbers = {
        "num_candidates": "SQL candidates per question, 1 to 100: more find more right answers and "
        "cost as many calls; the first is greedy, the others are sampled",
        "max_revise_rounds": "rounds in which failing or empty candidates are corrected, 0 to 10; "
        "0 switches correction off",
        "num_unit_tests": "unit tests to choose between candidates that disagree, 0 to 100; 0 lets "
        "the largest group of equal results win",
    }
    for name, text in numbers.items():
        agent.add_argument(
            f"--{name.replace('_', '-')}",
            type=int,
            default=_DEFAULTS[name],
            metavar="N",
            help=f"{text} (default: %(default)s)",
        )
    agent.add_argument(
        "--temperature",
        type=float,
        default=_DEFAULTS["temperature"],
        metavar="T",
        help="of the sampled candidates, 0 to 2: 0 makes them alike (default: %(default)s)",
    )
    agent.add_argument(
        "--max-tokens",
        type=_count,
        metavar="N",
        help="most tokens per answer (default: "
        + ", ".join(f"{number} with {name} prompts" for name, number in _MAX_TOKENS.items())
        + ")",
    )
    agent.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="of arrivals and sampling; the same seed repeats a run against a server whose "
        "answers do not depend on what else it serves (default: %(default)s)",
    )


def _run_ask(args: argparse.Namespace) -> int:
    return asyncio.run(_ask(args))


async def _ask(args: argparse.Namespace) -> int:
    async with _client(args) as client:
        agent = await _agent(args, client)
        answer = await agent.answer(
            args.question,
            evidence=args.evidence,
            slo_s=args.slo_s,
            tenant=args.tenant,
            seed=args.seed,
        )
    print(answer.sql, rows_table(answer.execution), timeline_chart(answer), sep="\n\n")
    return 0 if answer.execution.ran else 1


def _run_many(args: argparse.Namespace) -> int:
    return asyncio.run(_many(args))


async def _many(args: argparse.Namespace) -> int:
    questions = load_questions(args.questions)[: args.num_workflows]
    output = _writable(args.output)
    records: list[RunRecord] = []  # in the order in which they end, should the rest not come
    async with _client(args) as client:
        agent = await _agent(args, client)
        with tqdm(total=len(questions), unit="run", disable=args.disable_tqdm) as bar:

            def on_done(record: RunRecord) -> None:
                records.append(record)
                bar.update()

            try:
                records = await run_questions(
                    agent,
                    questions,
                    request_rate=args.request_rate,
                    max_concurrency=args.max_concurrency,
                    slo_s=args.slo_s,
                    tenant=args.tenant,
                    seed=args.seed,
                    on_done=on_done,
                )
            finally:
                totals = summary(records)
                if output is not None:
                    document = _document(args, agent, records, totals)
                    output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(summary_lines(totals))
    first_error = next((record.error for record in records if record.error), None)
    if first_error:
        print(f"first error: {first_error}", file=sys.stderr)
    return 1 if totals["failed_workflows"] else 0


def _document(
    args: argparse.Namespace,
    agent: Text2SqlAgent,
    records: list[RunRecord],
    totals: dict[str, Any],
) -> dict[str, Any]:
    """Return what `--output` holds: the conditions, the summary, every run."""
    conditions = {
        "db": args.db,
        "questions": args.questions,
        "base_url": args.base_url,
        "model": agent.model,
        "prompts": agent.prompts.name,
        "slo_s": args.slo_s,
        "request_rate": args.request_rate if math.isfinite(args.request_rate) else "inf",
        "max_concurrency": args.max_concurrency,
        "seed": args.seed,
        "agent": asdict(agent.options),
    }
    return {"conditions": conditions, **totals, "runs": [record.as_json() for record in records]}


def _client(args: argparse.Namespace) -> AsyncOpenAI:
    key = os.environ.get("OPENAI_API_KEY") or "none"
    return AsyncOpenAI(base_url=args.base_url, api_key=key, timeout=args.timeout_s)


async def _agent(args: argparse.Namespace, client: AsyncOpenAI) -> Text2SqlAgent:
    database = Database(args.db)
    prompts: PromptSet = CompactPrompts() if args.prompts == "compact" else FullPrompts()
    options = AgentOptions(
        num_candidates=args.num_candidates,
        max_revise_rounds=args.max_revise_rounds,
        num_unit_tests=args.num_unit_tests,
        temperature=args.temperature,
        max_tokens=args.max_tokens or _MAX_TOKENS[args.prompts],
    )
    model = args.model or await _first_model(args.base_url, client)
    return Text2SqlAgent(client, database, prompts, model=model, options=options)


async def _first_model(base_url: str, client: AsyncOpenAI) -> str:
    try:
        models = [model.id for model in (await client.models.list()).data]
    except (openai.OpenAIError, json.JSONDecodeError) as error:
        raise UpstreamError(f"{base_url}/models: {type(error).__name__}: {error}") from error
    if not models:
        raise UpstreamError(f"{base_url}/models: the server lists no models; give --model")
    return models[0]


def _writable(path: str | None) -> Path | None:
    """Return where to write, and find out now, not after an hour, if that is impossible."""
    if path is None:
        return None
    if not Path(path).resolve().parent.is_dir():
        raise ConfigError(f"--output {path}: wanted a file in an existing directory")
    return Path(path)


def _tenant(text: str) -> str:
    try:
        with workflow(WORKFLOW_NAME, tenant=text):
            return text
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _positive(text: str) -> float:
    number = float(text)
    if math.isnan(number) or number <= 0:
        raise argparse.ArgumentTypeError(f"wanted a positive number, got {text}")
    return number


def _seconds(text: str) -> float:
    number = _positive(text)
    if math.isinf(number):
        raise argparse.ArgumentTypeError(f"wanted a finite number of seconds, got {text}")
    return number


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"wanted an integer of at least 1, got {text}")
    return number
