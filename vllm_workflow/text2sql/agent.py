"""A CHESS-style Text-to-SQL agent: retrieve, generate, correct, test, choose.

The workflow of CHESS (arXiv 2405.16755) as HexGen-Text2SQL (arXiv 2505.05286) schedules it:
a serial prologue, a wide fan-out of candidates, a repair loop of unknown length, one call
that writes unit tests, and a wide fan-out of short judgements.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from openai import AsyncOpenAI

from vllm_workflow.client import Run, attach, workflow
from vllm_workflow.core.errors import ConfigError, WorkflowError
from vllm_workflow.text2sql.answer import Answer, UnitTest
from vllm_workflow.text2sql.caller import StageCaller
from vllm_workflow.text2sql.database import Database
from vllm_workflow.text2sql.retriever import ValueRetriever
from vllm_workflow.text2sql.selection import (
    choose,
    cluster,
    contenders,
    status_rank,
    with_verdicts,
)
from vllm_workflow.text2sql.types import (
    Execution,
    PromptSet,
    SqlCandidate,
    Stage,
    Status,
    Task,
    ValueHit,
)

WORKFLOW_NAME = "text2sql"

_T = TypeVar("_T")


class NoCandidateError(WorkflowError, RuntimeError):
    """No call of the generate stage gave a statement; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentOptions:
    """How much an agent does for one question."""

    num_candidates: int = 6
    """SQL candidates per question, at least 1; the first is greedy, the others sampled."""
    max_revise_rounds: int = 3
    """Rounds of correction, 0 to 10; the published system allows 10."""
    num_unit_tests: int = 5
    """Unit tests asked for when candidates disagree; 0 leaves the choice to the votes."""
    max_contenders: int = 6
    """Most clusters shown to the unit-test and evaluation stages, at least 2."""
    temperature: float = 0.7
    """Of the sampled candidates; every other call is greedy."""
    max_tokens: int | None = 1024
    """Most tokens per answer; None leaves it to the server."""

    def __post_init__(self) -> None:
        ranges = {
            "num_candidates": (1, 100),
            "max_revise_rounds": (0, 10),
            "num_unit_tests": (0, 100),
            "max_contenders": (2, 100),
            "temperature": (0, 2),
        }
        for name, (low, high) in ranges.items():
            got = getattr(self, name)
            if not low <= got <= high:
                raise ConfigError(f"AgentOptions.{name}: wanted {low} to {high}, got {got}")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ConfigError(
                f"AgentOptions.max_tokens: wanted at least 1 or None, got {self.max_tokens}"
            )


class Text2SqlAgent:
    """Answers questions over one database through one OpenAI-compatible endpoint.

    Holds no state of a run, so any number of runs may be in flight at once.

    Args:
        client: The endpoint: the router, a vLLM server, anything OpenAI-compatible. It is
            attached to the workflow context.
        database: What the questions are about.
        prompts: How to speak to the model.
        model: The model's name at the endpoint.
        retriever: Finds database values; by default one with default bounds.
        options: How much to do per question.
    """

    def __init__(
        self,
        client: AsyncOpenAI,
        database: Database,
        prompts: PromptSet,
        *,
        model: str,
        retriever: ValueRetriever | None = None,
        options: AgentOptions | None = None,
    ) -> None:
        self.client = attach(client)
        self.database = database
        self.prompts = prompts
        self.model = model
        self.retriever = retriever or ValueRetriever(database)
        self.options = options or AgentOptions()

    async def answer(
        self,
        question: str,
        *,
        evidence: str = "",
        slo_s: float | None = None,
        workflow_id: str | None = None,
        tenant: str | None = None,
        seed: int = 0,
    ) -> Answer:
        """Answer one question as one run of the workflow `text2sql`.

        Args:
            question: In ordinary language.
            evidence: Free text that helps to read the question, e.g. a definition.
            slo_s: Promise for the whole run, in seconds; it is sent along, and a run that
                misses it still ends with an answer.
            workflow_id: Identifies the run; random by default.
            tenant: Who the run is billed to.
            seed: Runs with the same seed against a deterministic server are the same.

        Raises:
            NoCandidateError: No call of the generate stage gave SQL.
            OverloadedError: The router refused the run.
        """
        with workflow(WORKFLOW_NAME, slo_s=slo_s, id=workflow_id, tenant=tenant) as run:
            return await _OneRun(self, run, seed).answer(question, evidence)


class _OneRun:
    """The state of one run: its calls, and the statements it has executed."""

    def __init__(self, agent: Text2SqlAgent, run: Run, seed: int) -> None:
        self.agent = agent
        self.database = agent.database
        self.retriever = agent.retriever
        self.prompts = agent.prompts
        self.options = agent.options
        self.run = run
        self.caller = StageCaller(
            agent.client, agent.model, run, seed=seed, max_tokens=agent.options.max_tokens
        )
        self.executions: dict[str, Execution] = {}

    async def answer(self, question: str, evidence: str) -> Answer:
        task = await self._prepare(question, evidence)
        candidates = await self._generate(task)
        candidates, num_rounds = await self._revise(task, candidates)
        clusters = cluster(candidates)
        tested = contenders(clusters, candidates, self.options.max_contenders)
        tests: tuple[UnitTest, ...] = ()
        if len(tested) > 1 and self.options.num_unit_tests > 0:
            shown = [candidates[clusters[index].members[0]] for index in tested]
            verdicts = await self._test(task, shown)
            tests = tuple(_spread(test, tested, len(clusters)) for test in verdicts)
            clusters = with_verdicts(clusters, tests)
        chosen = candidates[choose(clusters, candidates)]
        return Answer(
            question=question,
            sql=chosen.sql,
            execution=chosen.execution,
            workflow_id=self.run.workflow_id,
            latency_s=self.run.elapsed_s,
            slo_s=self.run.slo_s,
            hits=task.hits,
            candidates=tuple(candidates),
            clusters=clusters,
            tests=tests,
            calls=tuple(sorted(self.caller.calls, key=lambda call: call.start_s)),
            num_revise_rounds=num_rounds,
        )

    async def _prepare(self, question: str, evidence: str) -> Task:
        """Retrieve values and select the schema; both go on without a failed call."""
        text = await self.caller.ask(Stage.KEYWORDS, self.prompts.keywords(question, evidence))
        keywords = self.prompts.parse_keywords(text) if text is not None else []
        hits: tuple[ValueHit, ...] = await asyncio.to_thread(
            self.retriever.retrieve, keywords, f"{question} {evidence}".strip()
        )
        schema = await asyncio.to_thread(self.database.schema)
        task = Task(question=question, schema=schema, hits=hits, evidence=evidence)
        messages = self.prompts.select_schema(task)
        if messages is None:
            return task
        text = await self.caller.ask(Stage.SELECT_SCHEMA, messages)
        if text is None:
            return task
        return replace(task, schema=self.prompts.parse_select_schema(text, schema))

    async def _generate(self, task: Task) -> list[SqlCandidate]:
        """Ask for all candidates at once, in turns from the two templates."""
        options = self.options
        is_last = not options.max_revise_rounds and not self._may_test(options.num_candidates)
        texts = await _all(
            self.caller.ask(
                Stage.GENERATE,
                self.prompts.generate(task, index % 2),
                index=index,
                temperature=0.0 if index == 0 else options.temperature,
                final=is_last,
            )
            for index in range(options.num_candidates)
        )
        answered = [text for text in texts if text is not None]
        statements = [sql for sql in map(self.prompts.parse_sql, answered) if sql]
        if not statements:
            last = self.caller.last_error(Stage.GENERATE)
            raise NoCandidateError(
                f"run {self.run.workflow_id}: none of {len(texts)} calls of the stage generate "
                f"gave SQL; {len(texts) - len(answered)} failed"
                + (f", the last with: {last}" if last else "")
                + f"; {len(answered)} answers held no statement"
            )
        return await self._executed(statements)

    async def _revise(
        self, task: Task, candidates: list[SqlCandidate]
    ) -> tuple[list[SqlCandidate], int]:
        """Correct failing and empty candidates in rounds; return them and the rounds made.

        A statement is corrected once: the same question would get the same greedy answer.
        So the loop ends by itself when a round brings nothing new. A correction that does
        worse than what it corrects is not taken.
        """
        tried: set[str] = set()
        for num_rounds in range(self.options.max_revise_rounds):
            failing = {
                candidate.sql: candidate
                for candidate in candidates
                if candidate.execution.status is not Status.OK and candidate.sql not in tried
            }
            if not failing:
                return candidates, num_rounds
            # Candidates that are the same stay so, whatever becomes of them.
            num_distinct = len({candidate.sql for candidate in candidates})
            is_last = num_rounds + 1 == self.options.max_revise_rounds and not self._may_test(
                num_distinct
            )
            texts = await _all(
                self.caller.ask(
                    Stage.REVISE, self.prompts.revise(task, candidate), index=index, final=is_last
                )
                for index, candidate in enumerate(failing.values())
            )
            tried |= failing.keys()
            answers = (self.prompts.parse_sql(text) if text is not None else "" for text in texts)
            fixes = {old: new for old, new in zip(failing, answers, strict=True) if new}
            fixed = await self._executed(list(fixes.values()))
            by_old = dict(zip(fixes, fixed, strict=True))
            candidates = [_better(by_old.get(old.sql, old), old) for old in candidates]
        return candidates, self.options.max_revise_rounds

    def _may_test(self, num_statements: int) -> bool:
        """Whether so many statements may have to be told apart by tests."""
        return num_statements > 1 and self.options.num_unit_tests > 0

    async def _test(self, task: Task, shown: list[SqlCandidate]) -> list[UnitTest]:
        """Write unit tests and judge `shown` by them; by machine where that is possible."""
        count = self.options.num_unit_tests
        text = await self.caller.ask(Stage.UNIT_TESTS, self.prompts.unit_tests(task, shown, count))
        texts = self.prompts.parse_unit_tests(text)[:count] if text is not None else []
        checked = await _all(self._check(task, test, shown) for test in texts)
        open_tests = [test for test, row in zip(texts, checked, strict=True) if None in row]
        judged = await _all(
            self._judge(task, test, shown, index) for index, test in enumerate(open_tests)
        )
        by_model = dict(zip(open_tests, judged, strict=True))
        tests = []
        for test, row in zip(texts, checked, strict=True):
            opinions = by_model.get(test, row)
            passed = tuple(
                opinion if verdict is None else verdict
                for verdict, opinion in zip(row, opinions, strict=True)
            )
            tests.append(UnitTest(text=test, passed=passed, by_machine=test not in by_model))
        return tests

    async def _check(self, task: Task, test: str, shown: list[SqlCandidate]) -> list[bool | None]:
        def verdicts() -> list[bool | None]:
            database = self.database
            return [self.prompts.check(task, test, candidate, database) for candidate in shown]

        return await asyncio.to_thread(verdicts)

    async def _judge(
        self, task: Task, test: str, shown: list[SqlCandidate], index: int
    ) -> list[bool | None]:
        """Ask the model; no verdicts if the call fails. Nothing comes after these calls."""
        text = await self.caller.ask(
            Stage.EVALUATE, self.prompts.evaluate(task, shown, test), index=index, final=True
        )
        if text is None:
            return [None] * len(shown)
        return list(self.prompts.parse_evaluate(text, len(shown)))

    async def _executed(self, statements: Sequence[str]) -> list[SqlCandidate]:
        """Execute each distinct statement once per run."""
        new = [sql for sql in dict.fromkeys(statements) if sql not in self.executions]
        done = await _all(asyncio.to_thread(self.database.execute, sql) for sql in new)
        self.executions.update(zip(new, done, strict=True))
        return [SqlCandidate(sql=sql, execution=self.executions[sql]) for sql in statements]


async def _all(awaitables: Iterable[Coroutine[Any, Any, _T]]) -> list[_T]:
    """Run all at once; if one raises, the others are cancelled before it propagates."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(awaitable) for awaitable in awaitables]
    return [task.result() for task in tasks]


def _better(new: SqlCandidate, old: SqlCandidate) -> SqlCandidate:
    return new if status_rank(new.execution) <= status_rank(old.execution) else old


def _spread(test: UnitTest, tested: Sequence[int], num_clusters: int) -> UnitTest:
    """Turn verdicts of the tested clusters into one entry per cluster."""
    verdicts = dict(zip(tested, test.passed, strict=True))
    return replace(test, passed=tuple(verdicts.get(index) for index in range(num_clusters)))
