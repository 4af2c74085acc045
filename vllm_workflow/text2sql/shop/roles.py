"""Training examples of every stage of the compact prompts, derived from questions and gold SQL.

The prompts are made by `CompactPrompts` itself, so training and serving cannot drift apart, and
the failures shown are those that SQLite reports for the wrong query.
"""

from __future__ import annotations

import itertools
import json
import random
import re
import sqlite3
from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from vllm_workflow.text2sql.compact import FAILED, PASSED, CompactPrompts, clauses
from vllm_workflow.text2sql.shop import database as shop
from vllm_workflow.text2sql.shop.blur import blurred
from vllm_workflow.text2sql.shop.corruption import FAILING, MISLEADING, corrupted
from vllm_workflow.text2sql.shop.grammar import Grammar, Pair
from vllm_workflow.text2sql.shop.phrasing import Split
from vllm_workflow.text2sql.types import (
    Execution,
    Message,
    Schema,
    SqlCandidate,
    Stage,
    Status,
    Task,
    ValueHit,
)

MIX = {
    Stage.GENERATE: 60,
    Stage.REVISE: 20,
    Stage.UNIT_TESTS: 12,
    Stage.KEYWORDS: 5,
    Stage.EVALUATE: 3,
}
"""How many examples of each stage in 100."""

INVENTED = 0.15
"""Share of values that are in no database; see `Grammar`."""
BLURRED = 0.3
"""Share of questions whose words are disturbed."""
MISSPELT = 0.04
"""Share of questions in which a name has a letter too few or too many; the hint has it right."""
WITHOUT_HITS = 0.08
"""Share of questions for which value retrieval found nothing."""
TESTS_PER_ANSWER = 4

_GOLD_VALUE = re.compile(r"(\w+)\.(\w+) (?:=|<>) '([^']*)'")
_TEXT_COLUMNS = {
    "customers": ("name", "city", "country", "segment"),
    "employees": ("name", "department"),
    "orders": ("status", "channel"),
    "products": ("name", "category"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One prompt and the answer to learn."""

    stage: Stage
    messages: list[Message]
    answer: str
    pair: Pair
    """What the example was derived from, before its question was disturbed."""


class Shop:
    """The shop database in memory: executes SQL and finds the values a question mentions."""

    def __init__(self, seed: int = 7) -> None:
        self.connection = shop.build(seed=seed)
        self._places: dict[str, list[ValueHit]] = defaultdict(list)
        for table, columns in _TEXT_COLUMNS.items():
            for column in columns:
                for (value,) in self.connection.execute(f"SELECT DISTINCT {column} FROM {table}"):
                    hit = ValueHit(table=table, column=column, value=value)
                    self._places[value.casefold()].append(hit)

    def execute(self, sql: str) -> Execution:
        """Run a query of the training data; implements `Executor`, without its limits."""
        try:
            rows = self.connection.execute(sql).fetchmany(200)
        except (sqlite3.Error, sqlite3.Warning) as error:
            return Execution(sql=sql, status=Status.ERROR, message=str(error))
        status = Status.OK if rows else Status.EMPTY
        return Execution(sql=sql, status=status, rows=tuple(rows))

    def hits(self, question: str) -> tuple[ValueHit, ...]:
        """Return every value of one or two words that the question contains."""
        words = re.findall(r"\w+", question.casefold())
        phrases = words + [f"{a} {b}" for a, b in itertools.pairwise(words)]
        return tuple(hit for phrase in phrases for hit in self._places.get(phrase, ()))


class ExampleStream:
    """Draws training examples without end; the same seed draws the same examples."""

    def __init__(
        self, seed: int, *, split: Split = Split.TRAIN, held_out: Collection[str] = frozenset()
    ) -> None:
        """Start the stream.

        Args:
            seed: Seed of everything drawn.
            split: Which wordings may be used.
            held_out: Questions that never become an example.
        """
        self.rng = random.Random(seed)
        self.grammar = Grammar(seed + 1, split, invented=INVENTED)
        self.held_out = held_out
        self.shop = Shop()
        self.prompts = CompactPrompts()
        self._other_sql = "SELECT COUNT(*) FROM orders"

    def __iter__(self) -> Iterator[Example]:
        """Yield the examples."""
        while True:
            example = self.draw()
            if example is not None:
                yield example

    def draw(self) -> Example | None:
        """Return the next example; None if this question gives none for the stage drawn."""
        pair = self.grammar.sample()
        if pair.question in self.held_out:
            return None
        (stage,) = self.rng.choices(list(MIX), list(MIX.values()))
        messages, answer = self._prompt_and_answer(stage, self._task(pair), pair)
        self._other_sql = pair.sql
        if not answer:
            return None
        return Example(stage=stage, messages=messages, answer=answer, pair=pair)

    def _prompt_and_answer(self, stage: Stage, task: Task, pair: Pair) -> tuple[list[Message], str]:
        match stage:
            case Stage.GENERATE:
                template = self.rng.choice((0, 0, 1))
                plan = f"{plan_of(pair.sql)}\n" if template else ""
                return self.prompts.generate(task, template), plan + pair.sql
            case Stage.REVISE:
                wrong = self._failed_candidate(pair.sql)
                return self.prompts.revise(task, wrong), pair.sql
            case Stage.UNIT_TESTS:
                candidates = self._candidates(pair.sql)
                tests = "\n".join(telling_tests(pair.sql, [c.sql for c in candidates]))
                return self.prompts.unit_tests(task, candidates, TESTS_PER_ANSWER), tests
            case Stage.EVALUATE:
                candidates = self._candidates(pair.sql)
                test = self.rng.choice(clauses(pair.sql))
                return self.prompts.evaluate(task, candidates, test), verdicts(test, candidates)
            case _:
                return self.prompts.keywords(task.question, ""), keywords_of(pair)

    def _task(self, pair: Pair) -> Task:
        hits = self.shop.hits(pair.question)
        invented = [
            ValueHit(table=table, column=column, value=value)
            for table, column, value in _GOLD_VALUE.findall(pair.sql)
            if not any(hit.value == value for hit in hits)
        ]
        if self.rng.random() < 0.8:
            hits += tuple(invented)
        if self.rng.random() < WITHOUT_HITS:
            hits = ()
        question = pair.question
        kept = {value for _, _, value in _GOLD_VALUE.findall(pair.sql)}
        if self.rng.random() < MISSPELT and len(hits) == 1:
            question = question.replace(hits[0].value, misspelt(hits[0].value, self.rng))
        elif self.rng.random() < BLURRED:
            question = blurred(question, kept, self.rng)
        return Task(question=question, schema=Schema(tables=()), hits=hits)

    def _failed_candidate(self, sql: str) -> SqlCandidate:
        gold = self.shop.execute(sql)
        if gold.status is Status.EMPTY and self.rng.random() < 0.5:
            return SqlCandidate(sql=sql, execution=gold)  # nothing was found because nothing is
        while True:
            wrong = corrupted(sql, self._other_sql, self.rng, FAILING)
            execution = self.shop.execute(wrong)
            if execution.status is not Status.OK:
                return SqlCandidate(sql=wrong, execution=execution)

    def _candidates(self, sql: str) -> list[SqlCandidate]:
        """Two to four different queries, the right one mostly among them.

        In half of the cases the wrong ones are variants of one wrong query, not of the right one:
        what most candidates have in common must not give the answer away.
        """
        queries = {sql: None} if self.rng.random() < 0.85 else {}
        base = sql
        if self.rng.random() < 0.5:
            base = corrupted(sql, self._other_sql, self.rng, MISLEADING)
            queries[base] = None
        wanted = self.rng.randint(max(2, len(queries)), 4)
        while len(queries) < wanted:
            mistakes = MISLEADING if self.rng.random() < 0.8 else FAILING
            queries[corrupted(base, self._other_sql, self.rng, mistakes)] = None
        shuffled = self.rng.sample(list(queries), len(queries))
        return [SqlCandidate(sql=q, execution=self.shop.execute(q)) for q in shuffled]


def misspelt(value: str, rng: random.Random) -> str:
    """Return a name with one letter doubled or left out; other words as they are."""
    if not value[:1].isupper():
        return value
    place = rng.randrange(1, len(value))
    return value[:place] + rng.choice(("", value[place] * 2)) + value[place + 1 :]


def plan_of(sql: str) -> str:
    """Return the plan that template 1 asks for before the query: a comment with the tables."""
    return "-- tables: " + ", ".join(re.findall(r"(?<=FROM |JOIN )(\w+)", sql.split(" WHERE ")[0]))


def telling_tests(gold: str, candidates: list[str]) -> list[str]:
    """Return statements that hold for `gold` and not for all `candidates`, most telling first."""
    failing = {test: sum(test not in clauses(sql) for sql in candidates) for test in clauses(gold)}
    telling = [test for test, count in failing.items() if count]
    return sorted(telling, key=lambda test: -failing[test])[:TESTS_PER_ANSWER]


def verdicts(test: str, candidates: list[SqlCandidate]) -> str:
    """Return the answer of a judge who parses the candidates."""
    return "\n".join(
        f"{number}: {PASSED if test in clauses(candidate.sql) else FAILED}"
        for number, candidate in enumerate(candidates, 1)
    )


def keywords_of(pair: Pair) -> str:
    """Return the values of the question and the tables it is about, as a JSON list."""
    values = [value for _, _, value in _GOLD_VALUE.findall(pair.sql)]
    tables = re.findall(r"(?<=FROM |JOIN )(\w+)", pair.sql.split(" WHERE ")[0])
    return json.dumps([*values, *tables])
