"""Prompts for the small model that ships with the shop example: short, and without a schema.

A model of a few million parameters knows one database by heart and one task per first word of
the prompt. Its unit tests are statements about clauses, so a parser decides them, not a judge.
"""

from __future__ import annotations

import json
import re
from functools import lru_cache
from typing import Any

import sqlglot
from sqlglot import exp
from sqlglot.errors import SqlglotError

from vllm_workflow.text2sql.comparison import result_key
from vllm_workflow.text2sql.types import (
    Executor,
    Message,
    Schema,
    SqlCandidate,
    Status,
    Task,
    ValueHit,
)

MAX_HINTS = 4
MAX_TESTS = 20
MAX_MESSAGE_LENGTH = 160
"""SQLite's messages are shorter, unless they quote a long part of the query."""

PASSED = "pass"
FAILED = "fail"
SAME_RESULT = "same result as: "

NUMBER_WORDS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
"""From two on: "one" is mostly a pronoun."""

_NUMBER = re.compile(r"(?<![\w.])\d+(?:\.\d+)?(?!\w)")
_LITERAL = re.compile(r"'([^']*)'")
_SQL_START = re.compile(r"\b(?:SELECT|WITH)\b", re.IGNORECASE)
_FENCE = re.compile(r"```(?:sql)?\s*(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)
_LIST_MARK = re.compile(r"^\s*(?:[-*]|\d+[.):])\s+")
_VERDICT = re.compile(rf"^\s*(\d+)\s*[:.)]\s*({PASSED}|{FAILED})\w*\s*$", re.IGNORECASE)


class CompactPrompts:
    """The prompt set of the small shop model; implements `PromptSet`."""

    name = "compact"

    def keywords(self, question: str, evidence: str) -> list[Message]:
        return _user(f"Keywords: {_asked(question, evidence)}")

    def parse_keywords(self, text: str) -> list[str]:
        start, end = text.find("["), text.rfind("]")
        try:
            found = json.loads(text[start : end + 1])
        except (ValueError, RecursionError):
            return []
        if not isinstance(found, list):
            return []
        return list(dict.fromkeys(w.strip() for w in found if isinstance(w, str) and w.strip()))

    def select_schema(self, task: Task) -> list[Message] | None:
        return None

    def parse_select_schema(self, text: str, schema: Schema) -> Schema:
        return schema

    def generate(self, task: Task, template: int) -> list[Message]:
        return _user(f"{'Plan' if template else 'SQL'}: {_stated(task)}")

    def revise(self, task: Task, candidate: SqlCandidate) -> list[Message]:
        execution = candidate.execution
        result = "no rows" if execution.status is Status.EMPTY else execution.message
        result = " ".join(result.split())[:MAX_MESSAGE_LENGTH]
        query = " ".join(candidate.sql.split())
        return _user(f"Fix: {_stated(task)}\nQuery: {query}\nResult: {result or 'no rows'}")

    def parse_sql(self, text: str) -> str:
        if fence := _FENCE.search(text):
            text = fence.group(1)
        start = _SQL_START.search(text)
        if start is None:
            return ""
        return " ".join(text[start.start() :].split()).rstrip("; ")

    def unit_tests(self, task: Task, candidates: list[SqlCandidate], count: int) -> list[Message]:
        return _user(f"Tests: {_stated(task)}\n{_numbered(candidates)}")

    def parse_unit_tests(self, text: str) -> list[str]:
        lines = (_LIST_MARK.sub("", line).strip() for line in text.splitlines())
        return list(dict.fromkeys([*FIXED_TESTS, *(line for line in lines if line)]))[:MAX_TESTS]

    def check(self, task: Task, test: str, candidate: SqlCandidate, db: Executor) -> bool | None:
        test = " ".join(test.split()).rstrip(".")
        if test.startswith(SAME_RESULT):
            probe = db.execute(test.removeprefix(SAME_RESULT))
            if not probe.ran:
                return None
            return result_key(candidate.execution) == result_key(probe)
        if test in FIXED_TESTS:
            return _passes_fixed(task, test, candidate.sql)
        if not test.startswith(ASPECTS):
            return None
        if test.startswith(CONDITIONS) and not _numbers(test) <= _numbers(_question(task)):
            return False  # the test speaks of a number that nobody asked about
        return test in clauses(candidate.sql)

    def evaluate(self, task: Task, candidates: list[SqlCandidate], test: str) -> list[Message]:
        return _user(f"Judge: {_question(task)}\nTest: {test}\n{_numbered(candidates)}")

    def parse_evaluate(self, text: str, num_candidates: int) -> list[bool]:
        verdicts = [False] * num_candidates
        for line in text.splitlines():
            verdict = _VERDICT.match(line)
            if verdict and len(verdict.group(1)) < 9:
                index = int(verdict.group(1)) - 1
                if 0 <= index < num_candidates:
                    verdicts[index] = verdict.group(2).lower() == PASSED
        return verdicts


USES_EVERY_NUMBER = "uses every number of the question"
USES_EVERY_VALUE = "uses every value of the hint"
USES_NOTHING_ELSE = "uses no other numbers and values"
FIXED_TESTS = (USES_EVERY_NUMBER, USES_EVERY_VALUE, USES_NOTHING_ELSE)
"""Asked of every set of candidates, before the tests that the model wrote.

CHESS has such a test too. The commonest mistake of a small model is to copy one number twice and
to forget another, and these tests see it without having to understand the question.
"""

CONDITIONS = ("filters ", "keeps groups ")
ASPECTS = (
    "selects ",
    "reads ",
    "filters ",
    "has ",
    "groups by ",
    "does not group",
    "keeps groups ",
    "orders by ",
    "does not order",
    "returns ",
    "removes duplicates",
)
"""How the statements begin that `clauses` can make about a query."""


@lru_cache(maxsize=8192)
def clauses(sql: str) -> tuple[str, ...]:
    """Return what can be stated about the clauses of one SELECT, empty if it cannot be parsed.

    Each statement is a unit test that the query passes. Equal tuples mean equal queries, up to
    the form of the joins.
    """
    try:
        query = sqlglot.parse_one(sql, read="sqlite")
    except (SqlglotError, RecursionError):
        return ()
    if not isinstance(query, exp.Select) or not query.expressions:
        return ()
    columns = [_text(column) for column in query.expressions]
    filters = _filters(query)
    found = [f"selects {', '.join(columns)}", f"reads {', '.join(sorted(_tables(query)))}"]
    found += [f"filters {condition}" for condition in filters]
    found.append(f"has {len(filters)} filters")
    group, order, limit = (query.args.get(name) for name in ("group", "order", "limit"))
    found.append(f"groups by {_list(group)}" if group else "does not group")
    if having := query.args.get("having"):
        found.append(f"keeps groups {_text(having.this)}")
    found.append(f"orders by {_list(order)}" if order else "does not order")
    found.append(f"returns {_text(limit.expression)} rows" if limit else "returns all rows")
    found.append(f"returns {len(columns)} columns")
    if query.args.get("distinct"):
        found.append("removes duplicates")
    return tuple(found)


def hints(question: str, hits: tuple[ValueHit, ...]) -> str:
    """Return the hits as conditions, in the order in which the question mentions them.

    A value that the question does not contain is a resemblance. The first of them serves if
    nothing better is known and it is a name: ordinary words resemble each other too often.
    """
    placed = sorted(
        (position, -len(hit.value), f"{hit.table}.{hit.column} = '{hit.value}'")
        for hit in hits
        if (position := _position(hit.value, question)) is not None
    )
    found = [text for _, _, text in placed]
    if not found:
        names = [hit for hit in hits if hit.value[:1].isupper()]
        found = [f"{hit.table}.{hit.column} = '{hit.value}'" for hit in names[:1]]
    return "; ".join(found[:MAX_HINTS]) or "none"


def _passes_fixed(task: Task, test: str, sql: str) -> bool:
    question = _question(task)
    mentioned = {hit.value for hit in task.hits if _position(hit.value, question) is not None}
    literals = set(_LITERAL.findall(sql))
    used = _numbers(_LITERAL.sub("", sql))
    if test == USES_EVERY_NUMBER:
        return _numbers(question) <= used
    if test == USES_EVERY_VALUE:
        return mentioned <= literals
    known = {hit.value for hit in task.hits}
    unknown = [v for v in literals - known if v.casefold() not in question.casefold()]
    return not unknown and used - {"1"} <= _numbers(question)  # LIMIT 1 is said without a number


def _position(value: str, question: str) -> int | None:
    """Return where `question` contains `value` as whole words, ignoring case."""
    pattern = rf"(?<!\w){re.escape(value.casefold())}(?!\w)"
    match = re.search(pattern, question.casefold())
    return match.start() if match else None


def _numbers(text: str) -> set[str]:
    """Return the numbers of a text or a query, also those in words, as digits."""
    words = re.findall(r"[a-z]+", text.casefold())
    spoken = {str(NUMBER_WORDS.index(word) + 2) for word in words if word in NUMBER_WORDS}
    return spoken | set(_NUMBER.findall(text))


def _question(task: Task) -> str:
    return _asked(task.question, task.evidence)


def _user(content: str) -> list[Message]:
    return [{"role": "user", "content": content}]


def _asked(question: str, evidence: str) -> str:
    return " ".join(f"{question} {evidence}".split())


def _stated(task: Task) -> str:
    question = _question(task)
    return f"{question}\nHint: {hints(question, task.hits)}"


def _numbered(candidates: list[SqlCandidate]) -> str:
    return "\n".join(
        f"{number}: {' '.join(candidate.sql.split())}"
        for number, candidate in enumerate(candidates, 1)
    )


def _text(node: Any) -> str:
    return str(node.sql(dialect="sqlite", comments=False))


def _list(clause: Any) -> str:
    return ", ".join(_text(node) for node in clause.expressions)


def _tables(query: exp.Select) -> set[str]:
    """Names of the tables that the query itself reads, without those of its subqueries."""
    sources = [query.args.get("from_") or query.args.get("from"), *(query.args.get("joins") or ())]
    return {source.this.name for source in sources if source and isinstance(source.this, exp.Table)}


def _filters(query: exp.Select) -> list[str]:
    where = query.args.get("where")
    if where is None:
        return []
    conjuncts = where.this.flatten() if isinstance(where.this, exp.And) else [where.this]
    return [_text(condition) for condition in conjuncts]
