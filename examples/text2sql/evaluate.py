"""Measure execution accuracy: one greedy call against the full workflow, per question set.

Needs an OpenAI-compatible server that serves the model, for example:

    vllm serve examples/text2sql/model --served-model-name shop-sql --port 8100

An answer is right if its result equals that of the gold SQL, in order if the gold SQL orders.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openai import AsyncOpenAI

from vllm_workflow.text2sql.agent import AgentOptions, NoCandidateError, Text2SqlAgent
from vllm_workflow.text2sql.answer import Answer
from vllm_workflow.text2sql.compact import CompactPrompts
from vllm_workflow.text2sql.comparison import same_result
from vllm_workflow.text2sql.database import Database
from vllm_workflow.text2sql.shop.database import build
from vllm_workflow.text2sql.types import Status, Task

HERE = Path(__file__).parent
SETS = ("questions", "questions_wording", "questions_handwritten")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of one question."""

    question: dict[str, str]
    greedy_sql: str
    greedy_right: bool
    greedy_status: Status
    answer: Answer | None
    """None if the workflow found no candidate."""
    workflow_right: bool


async def greedy_sql(agent: Text2SqlAgent, question: str) -> str:
    """Return the SQL of a single greedy call, helped by value retrieval as the workflow is."""
    hits = await asyncio.to_thread(agent.retriever.retrieve, (), question)
    task = Task(question=question, schema=agent.database.schema(), hits=hits)
    completion = await agent.client.chat.completions.create(
        model=agent.model,
        messages=agent.prompts.generate(task, 0),  # type: ignore[arg-type]  # one type per role
        temperature=0.0,
        max_tokens=agent.options.max_tokens,
    )
    return agent.prompts.parse_sql(completion.choices[0].message.content or "")


async def outcome(agent: Text2SqlAgent, entry: dict[str, str], seed: int) -> Outcome:
    """Answer one question both ways."""
    gold = agent.database.execute(entry["sql"])
    sql = await greedy_sql(agent, entry["question"])
    execution = agent.database.execute(sql)
    try:
        answer = await agent.answer(entry["question"], seed=seed)
    except NoCandidateError:
        answer = None
    return Outcome(
        question=entry,
        greedy_sql=sql,
        greedy_right=same_result(execution, gold),
        greedy_status=execution.status,
        answer=answer,
        workflow_right=answer is not None and same_result(answer.execution, gold),
    )


async def outcomes(
    agent: Text2SqlAgent, entries: list[dict[str, str]], seed: int, concurrency: int
) -> list[Outcome]:
    """Answer all questions, at most `concurrency` at a time."""
    slots = asyncio.Semaphore(concurrency)

    async def one(number: int, entry: dict[str, str]) -> Outcome:
        async with slots:
            return await outcome(agent, entry, seed + number)

    return await asyncio.gather(*(one(number, entry) for number, entry in enumerate(entries)))


def summary(name: str, results: list[Outcome]) -> dict[str, Any]:
    """Return the numbers of one question set."""
    count = len(results)
    answers = [result.answer for result in results if result.answer is not None]
    calls = Counter(call.stage for answer in answers for call in answer.calls)
    return {
        "set": name,
        "questions": count,
        "greedy_accuracy": round(sum(r.greedy_right for r in results) / count, 4),
        "workflow_accuracy": round(sum(r.workflow_right for r in results) / count, 4),
        "gained": sum(r.workflow_right and not r.greedy_right for r in results),
        "lost": sum(r.greedy_right and not r.workflow_right for r in results),
        "right_among_candidates": round(
            sum(r.workflow_right or _among(r) for r in results) / count, 4
        ),
        "greedy_failed_or_empty": round(
            sum(r.greedy_status is not Status.OK for r in results) / count, 4
        ),
        "calls_per_workflow": round(sum(calls.values()) / count, 2),
        "calls_by_stage": dict(calls),
        "failed_calls": sum(call.error is not None for a in answers for call in a.calls),
        "median_latency_s": round(statistics.median(a.latency_s for a in answers), 3)
        if answers
        else "none",
    }


def _among(result: Outcome) -> bool:
    """Whether some candidate has the text of the gold SQL."""
    return result.answer is not None and any(
        candidate.sql == result.question["sql"] for candidate in result.answer.candidates
    )


def print_wrong(results: list[Outcome], limit: int) -> None:
    """Print questions that the workflow answered wrongly."""
    wrong = [result for result in results if not result.workflow_right]
    for result in wrong[:limit]:
        answer = result.answer
        print(f"  {result.question['id']}: {result.question['question']}")
        print(f"    gold     {result.question['sql']}")
        print(f"    greedy   {'right' if result.greedy_right else result.greedy_sql}")
        print(f"    workflow {answer.sql if answer else 'no candidate'}")
        for test in answer.tests if answer else ():
            print(f"    test     {test.text} {test.passed}")


async def evaluate(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Run all question sets and return their numbers."""
    options = AgentOptions(
        num_candidates=args.num_candidates,
        max_revise_rounds=args.max_revise_rounds,
        num_unit_tests=args.num_unit_tests,
        temperature=args.temperature,
        max_tokens=256,
    )
    reports = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shop.sqlite"
        build(path).close()
        client = AsyncOpenAI(base_url=args.base_url, api_key="none", timeout=120.0)
        agent = Text2SqlAgent(
            client, Database(path), CompactPrompts(), model=args.model, options=options
        )
        for name in args.sets:
            text = (args.folder / f"{name}.jsonl").read_text(encoding="utf-8")
            entries = [json.loads(line) for line in text.splitlines()][: args.limit]
            results = await outcomes(agent, entries, args.seed, args.concurrency)
            reports.append(summary(name, results))
            print(json.dumps(reports[-1]), flush=True)
            print_wrong(results, args.show_wrong)
        await client.close()
    return reports


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    defaults = AgentOptions()
    cli = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cli.add_argument(
        "--base-url",
        default="http://127.0.0.1:8100/v1",
        help="where the server's API begins (default: %(default)s)",
    )
    cli.add_argument(
        "--model", default="shop-sql", help="name of the model at the server (default: %(default)s)"
    )
    cli.add_argument(
        "--sets",
        nargs="+",
        choices=SETS,
        default=list(SETS),
        help="question sets to run (default: all)",
    )
    cli.add_argument(
        "--folder", type=Path, default=HERE, help="where the question sets are (default: here)"
    )
    cli.add_argument(
        "--limit", type=int, help="use only the first LIMIT questions of each set (default: all)"
    )
    cli.add_argument(
        "--num-candidates",
        type=int,
        default=defaults.num_candidates,
        help="candidates per question, 1 to 100; the first is greedy (default: %(default)s)",
    )
    cli.add_argument(
        "--max-revise-rounds",
        type=int,
        default=defaults.max_revise_rounds,
        help="rounds of correction, 0 to 10 (default: %(default)s)",
    )
    cli.add_argument(
        "--num-unit-tests",
        type=int,
        default=defaults.num_unit_tests,
        help="unit tests when candidates disagree; 0 leaves it to the votes (default: %(default)s)",
    )
    cli.add_argument(
        "--temperature",
        type=float,
        default=defaults.temperature,
        help="of all candidates but the first, 0 to 2 (default: %(default)s)",
    )
    cli.add_argument(
        "--seed", type=int, default=0, help="sampling seed of the first question (default: 0)"
    )
    cli.add_argument(
        "--concurrency", type=int, default=8, help="questions in flight (default: %(default)s)"
    )
    cli.add_argument(
        "--show-wrong", type=int, default=0, help="wrong answers to print per set (default: 0)"
    )
    cli.add_argument("--out", type=Path, help="file for the numbers as JSON (default: none)")
    return cli


def main() -> None:
    """Run the command line."""
    args = parser().parse_args()
    reports = asyncio.run(evaluate(args))
    if args.out:
        args.out.write_text(json.dumps(reports, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
