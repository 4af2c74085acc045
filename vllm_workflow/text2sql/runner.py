"""Many questions through one agent: arrivals, concurrency, and what became of each run."""

from __future__ import annotations

import asyncio
import json
import math
import random
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vllm_workflow.core.errors import ConfigError, OverloadedError, WorkflowError
from vllm_workflow.text2sql.agent import Text2SqlAgent
from vllm_workflow.text2sql.answer import Answer, StageCall
from vllm_workflow.text2sql.comparison import same_result

_FIELDS = ("question", "id", "sql", "evidence")


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One line of a questions file."""

    id: str
    question: str
    sql: str | None = None
    """Gold SQL, if the answer is to be compared."""
    evidence: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """What became of one question."""

    question: Question
    workflow_id: str
    arrival_s: float
    """When the question arrived, in seconds since the first one could."""
    client_queue_s: float
    """How long it then waited for `max_concurrency`; not part of `latency_s`."""
    latency_s: float
    deadline_met: bool | None
    """None without an SLO; False if the run failed."""
    answer: Answer | None
    """None if the run failed."""
    correct: bool | None
    """Execution match with the gold SQL; None without one, or if that does not run."""
    error: str | None = None
    """Why the run failed, or why its answer could not be compared."""
    rejected: bool = False
    """The router refused it at its first call; it missed its SLO without a call served."""

    @property
    def status(self) -> str:
        """`ok`, `empty`, `error`, `refused` or `timeout` of the chosen SQL, or of the run `failed`
        or `rejected`."""
        if self.rejected:
            return "rejected"
        return self.answer.execution.status.value if self.answer else "failed"

    @property
    def timeline(self) -> tuple[StageCall, ...]:
        return self.answer.calls if self.answer else ()

    def as_json(self) -> dict[str, Any]:
        """Return the record as JSON values; rows of results are left out."""
        answer = self.answer
        return {
            "id": self.question.id,
            "workflow_id": self.workflow_id,
            "question": self.question.question,
            "sql": answer.sql if answer else None,
            "gold_sql": self.question.sql,
            "status": self.status,
            "correct": self.correct,
            "error": self.error,
            "arrival_s": self.arrival_s,
            "client_queue_s": self.client_queue_s,
            "latency_s": self.latency_s,
            "deadline_met": self.deadline_met,
            "num_calls": len(self.timeline),
            "num_candidates": len(answer.candidates) if answer else 0,
            "num_clusters": len(answer.clusters) if answer else 0,
            "num_tests": len(answer.tests) if answer else 0,
            "num_revise_rounds": answer.num_revise_rounds if answer else 0,
            "timeline": [asdict(call) for call in self.timeline],
        }


def load_questions(path: str | Path) -> list[Question]:
    """Read a JSONL file of questions; `id` defaults to the line number.

    Raises:
        ConfigError: Naming file, line and field of the first mistake.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    questions = [
        _question(line, f"{path}:{number}", str(number))
        for number, line in enumerate(text.splitlines(), 1)
        if line.strip()
    ]
    if not questions:
        raise ConfigError(f"{path}: wanted one JSON object per line, got no lines")
    return questions


async def run_questions(
    agent: Text2SqlAgent,
    questions: Sequence[Question],
    *,
    request_rate: float = math.inf,
    max_concurrency: int | None = None,
    slo_s: float | None = None,
    tenant: str | None = None,
    seed: int = 0,
    on_done: Callable[[RunRecord], None] | None = None,
) -> list[RunRecord]:
    """Send every question through `agent`; return records in the order of `questions`.

    Args:
        agent: Answers the questions.
        questions: What to ask, in order of arrival.
        request_rate: Runs that arrive per second, as a Poisson process; all at once if inf.
        max_concurrency: Most runs in flight; a run's SLO counts from when it is let in.
        slo_s: Promise for each run.
        tenant: Who the runs are billed to.
        seed: Of the arrivals and, with the position of the question, of each run.
        on_done: Called after each run, e.g. to move a progress bar.
    """
    limit = asyncio.Semaphore(max_concurrency) if max_concurrency else None
    start = time.monotonic()

    async def one(index: int, question: Question, arrival_s: float) -> RunRecord:
        await asyncio.sleep(max(0.0, start + arrival_s - time.monotonic()))
        arrival_s = time.monotonic() - start
        async with AsyncExitStack() as stack:
            if limit is not None:
                await stack.enter_async_context(limit)
            queue_s = time.monotonic() - start - arrival_s
            record = await _run_one(
                agent, question, arrival_s, queue_s, slo_s, tenant, seed * 1_000_003 + index
            )
        if on_done is not None:
            on_done(record)
        return record

    arrivals = _arrivals(request_rate, random.Random(seed))
    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(one(index, question, next(arrivals)))
            for index, question in enumerate(questions)
        ]
    return [task.result() for task in tasks]


def summary(records: Sequence[RunRecord]) -> dict[str, Any]:
    """Return counts and rates over runs; None where there is nothing to count."""
    latencies = sorted(record.latency_s for record in records if record.answer)
    with_gold = [record.correct for record in records if record.correct is not None]
    with_slo = [record.deadline_met for record in records if record.deadline_met is not None]
    return {
        "num_workflows": len(records),
        "completed_workflows": len(latencies),
        "failed_workflows": sum(record.status == "failed" for record in records),
        "rejected_workflows": sum(record.rejected for record in records),
        "execution_accuracy": _mean(with_gold),
        "slo_attainment": _mean(with_slo),
        "mean_workflow_latency_ms": _mean([1000 * latency for latency in latencies]),
        "p50_workflow_latency_ms": _percentile_ms(latencies, 0.50),
        "p95_workflow_latency_ms": _percentile_ms(latencies, 0.95),
        "mean_calls_per_workflow": _mean([len(r.timeline) for r in records if r.answer]),
    }


async def _run_one(
    agent: Text2SqlAgent,
    question: Question,
    arrival_s: float,
    queue_s: float,
    slo_s: float | None,
    tenant: str | None,
    seed: int,
) -> RunRecord:
    start = time.monotonic()
    workflow_id = uuid.uuid4().hex
    answer: Answer | None = None
    error: str | None = None
    rejected = False
    try:
        answer = await agent.answer(
            question.question,
            evidence=question.evidence,
            slo_s=slo_s,
            workflow_id=workflow_id,
            tenant=tenant,
            seed=seed,
        )
    except OverloadedError as failure:
        rejected, error = True, str(failure)
    except WorkflowError as failure:
        error = str(failure)
    latency_s = answer.latency_s if answer else time.monotonic() - start
    correct: bool | None = None
    if question.sql is not None:
        gold = await asyncio.to_thread(agent.database.execute, question.sql)
        if gold.ran:
            correct = answer is not None and same_result(answer.execution, gold)
        else:
            error = error or f"not compared: the gold SQL gave {gold.status}: {gold.message}"
    return RunRecord(
        question=question,
        workflow_id=workflow_id,
        arrival_s=arrival_s,
        client_queue_s=queue_s,
        latency_s=latency_s,
        deadline_met=None if slo_s is None else bool(answer and answer.deadline_met),
        answer=answer,
        correct=correct,
        error=error,
        rejected=rejected,
    )


def _question(line: str, where: str, number: str) -> Question:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: not JSON: {error}") from error
    if not isinstance(entry, dict):
        raise ConfigError(f"{where}: wanted a JSON object, got {line.strip():.60}")
    unknown = sorted(entry.keys() - set(_FIELDS))
    if unknown:
        raise ConfigError(f"{where}: unknown field {unknown[0]!r}; known fields are {_FIELDS}")
    if isinstance(entry.get("id"), int) and not isinstance(entry["id"], bool):
        entry["id"] = str(entry["id"])
    for name in _FIELDS:
        value = entry.get(name)
        if value is not None and not isinstance(value, str):
            raise ConfigError(f"{where}: field {name!r}: wanted a string, got {value!r:.60}")
    question = (entry.get("question") or "").strip()
    if not question:
        raise ConfigError(f"{where}: field 'question': wanted a question, got none")
    return Question(
        id=entry.get("id") or number,
        question=question,
        sql=entry.get("sql") or None,
        evidence=entry.get("evidence") or "",
    )


def _arrivals(request_rate: float, rng: random.Random) -> Iterator[float]:
    """Yield arrival times of a Poisson process that starts with an arrival at 0."""
    arrival_s = 0.0
    while True:
        yield arrival_s
        if math.isfinite(request_rate):
            arrival_s += rng.expovariate(request_rate)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _percentile_ms(ordered: Sequence[float], share: float) -> float | None:
    """Return the smallest value that at least `share` of the sample does not exceed."""
    if not ordered:
        return None
    return 1000 * ordered[max(0, math.ceil(share * len(ordered)) - 1)]
