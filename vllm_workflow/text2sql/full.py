"""Prompts for ordinary instruct models, in the roles of CHESS."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence

import sqlglot
from sqlglot import TokenType, exp
from sqlglot.errors import SqlglotError

from vllm_workflow.text2sql import full_templates as templates
from vllm_workflow.text2sql.types import (
    Column,
    Executor,
    Message,
    Schema,
    SqlCandidate,
    Status,
    Table,
    Task,
)

_PLAIN_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
_LIST_MARK = re.compile(r"^\s*(?:[-*•]|\d{1,3}[.):])\s+")
_VERDICT = re.compile(r"\b(\d{1,4})\b.*?\b(passed|failed)\b", re.IGNORECASE)

_MAX_CELL_LENGTH = 80
_MAX_ROWS_SHOWN = 5
_MAX_PARSED_LENGTH = 200_000


class FullPrompts:
    """The prompt set for any instruct model; implements `PromptSet`.

    Args:
        min_columns_to_select: Schema selection is skipped for a database with fewer columns:
            a call that can only lose columns is not worth its time there.
    """

    name = "full"

    def __init__(self, *, min_columns_to_select: int = 40) -> None:
        self.min_columns_to_select = min_columns_to_select

    def keywords(self, question: str, evidence: str) -> list[Message]:
        return _messages(templates.KEYWORDS, _asked(question, evidence), "Answer:")

    def parse_keywords(self, text: str) -> list[str]:
        return _strings(text)

    def select_schema(self, task: Task) -> list[Message] | None:
        if sum(len(table.columns) for table in task.schema.tables) < self.min_columns_to_select:
            return None
        return _messages(templates.SELECT_SCHEMA, _stated(task), "Answer:")

    def parse_select_schema(self, text: str, schema: Schema) -> Schema:
        """Keep what was named, and the columns by which the kept tables are joined."""
        answer = _json_of(_thought_removed(text), "{", "}")
        if not isinstance(answer, dict):
            return schema
        wanted = {
            str(table).casefold(): {str(column).casefold() for column in columns}
            for table, columns in answer.items()
            if isinstance(columns, list)
        }
        known = {table.name.casefold() for table in schema.tables}
        tables = tuple(
            _part(table, wanted[table.name.casefold()], wanted.keys() & known)
            for table in schema.tables
            if table.name.casefold() in wanted
        )
        return Schema(tables=tables) if tables else schema

    def generate(self, task: Task, template: int) -> list[Message]:
        system = templates.QUERY_PLAN if template % 2 else templates.DIVIDE_AND_CONQUER
        return _messages(system, _stated(task), "Answer:")

    def revise(self, task: Task, candidate: SqlCandidate) -> list[Message]:
        return _messages(
            templates.REVISE,
            _stated(task),
            f"Query:\n```sql\n{candidate.sql}\n```",
            f"What happened: {_outcome(candidate)}",
            "Answer:",
        )

    def parse_sql(self, text: str) -> str:
        """Take the last fenced block with a query, else the last paragraph with one."""
        text = _thought_removed(text)
        blocks = [block for block in map(_stripped, _fenced(text)) if block]
        queries = [block for block in blocks if _starts_like_query(block)]
        return queries[-1] if queries else _trailing_query(text)

    def unit_tests(self, task: Task, candidates: list[SqlCandidate], count: int) -> list[Message]:
        ask = f"Write at most {count} unit tests.\nAnswer:"
        return _messages(templates.UNIT_TESTS, _stated(task), _shown(candidates), ask)

    def parse_unit_tests(self, text: str) -> list[str]:
        return _strings(text)

    def check(self, task: Task, test: str, candidate: SqlCandidate, db: Executor) -> bool | None:
        """Leave every test to the model: the tests are written in words."""
        return None

    def evaluate(self, task: Task, candidates: list[SqlCandidate], test: str) -> list[Message]:
        return _messages(
            templates.EVALUATE,
            _stated(task),
            _shown(candidates),
            f"Unit test: {test}",
            "Answer:",
        )

    def parse_evaluate(self, text: str, num_candidates: int) -> list[bool]:
        verdicts = [False] * num_candidates
        for line in _thought_removed(text).splitlines():
            for number, word in _VERDICT.findall(line):
                if 1 <= int(number) <= num_candidates:
                    verdicts[int(number) - 1] = word.lower() == "passed"
        return verdicts


def ddl(schema: Schema) -> str:
    """Return a schema as CREATE TABLE statements with example values in comments."""
    return "\n".join(map(_create_table, schema.tables))


def _messages(system: str, *parts: str) -> list[Message]:
    user = "\n\n".join(part for part in parts if part)
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]


def _asked(question: str, evidence: str) -> str:
    return f"Question: {question}" + (f"\nEvidence: {evidence}" if evidence else "")


def _stated(task: Task) -> str:
    """Return schema, values and question: from the most to the least shared text."""
    hits = "; ".join(f"{hit.table}.{hit.column} = {_literal(hit.value)}" for hit in task.hits)
    return (
        f"Schema:\n{ddl(task.schema)}\n\n"
        f"Values found in the database: {hits or 'none'}\n"
        f"{_asked(task.question, task.evidence)}"
    )


def _create_table(table: Table) -> str:
    entries = [_column(column) for column in table.columns]
    entries += [
        (
            f"FOREIGN KEY ({_name(key.column)}) REFERENCES {_name(key.ref_table)}"
            f" ({_name(key.ref_column)})",
            "",
        )
        for key in table.foreign_keys
    ]
    last = len(entries) - 1
    lines = [
        f"  {entry}{',' if index < last else ''}{f' -- {note}' if note else ''}"
        for index, (entry, note) in enumerate(entries)
    ]
    return "\n".join([f"CREATE TABLE {_name(table.name)} (", *lines, ");"])


def _column(column: Column) -> tuple[str, str]:
    """Return definition and comment of one column."""
    words = [_name(column.name), column.type, "PRIMARY KEY" if column.primary_key else ""]
    return " ".join(filter(None, words)), ", ".join(map(_literal, column.examples))


def _name(name: str) -> str:
    return name if _PLAIN_NAME.match(name) else '"' + name.replace('"', '""') + '"'


def _literal(value: object) -> str:
    """Return a value as SQL writes it, on one line and not longer than a cell."""
    if value is None:
        return "NULL"
    if isinstance(value, bytes):
        return f"<{len(value)} bytes>"
    if isinstance(value, (int, float)):
        return str(value)
    text = " ".join(str(value).split())
    if len(text) > _MAX_CELL_LENGTH:
        text = text[: _MAX_CELL_LENGTH - 1] + "…"
    return "'" + text.replace("'", "''") + "'"


def _outcome(candidate: SqlCandidate) -> str:
    """Describe an execution in words, with the first rows if there are any."""
    execution = candidate.execution
    if execution.status is Status.EMPTY:
        return "it ran and returned no rows"
    if not execution.ran:
        return f"{execution.status.value}: {execution.message}"
    rows = [f"({', '.join(map(_literal, row))})" for row in execution.rows[:_MAX_ROWS_SHOWN]]
    more = "at least " if execution.truncated else ""
    head = f"{more}{len(execution.rows)} rows of ({', '.join(execution.columns)})"
    return f"{head}; the first: {', '.join(rows)}"


def _shown(candidates: Sequence[SqlCandidate]) -> str:
    return "\n\n".join(
        f"Candidate {number}:\n{candidate.sql}\nResult: {_outcome(candidate)}"
        for number, candidate in enumerate(candidates, 1)
    )


def _part(table: Table, columns: set[str], tables: Iterable[str]) -> Table:
    """Return the named columns of a table, its key, and its links to the other `tables`."""
    links = tuple(key for key in table.foreign_keys if key.ref_table.casefold() in set(tables))
    linking = {key.column.casefold() for key in links}
    kept = tuple(
        column
        for column in table.columns
        if column.primary_key or column.name.casefold() in columns | linking
    )
    return Table(name=table.name, columns=kept or table.columns, foreign_keys=links)


def _thought_removed(text: str) -> str:
    """Return what a reasoning model says after its last thought."""
    return text.rpartition("</think>")[2]


def _json_of(text: str, opening: str, closing: str) -> object:
    """Return the outermost JSON value between two brackets; None if there is none."""
    start, end = text.find(opening), text.rfind(closing)
    if not 0 <= start < end or end - start > _MAX_PARSED_LENGTH:
        return None
    try:
        return json.loads(text[start : end + 1])
    except (ValueError, RecursionError):
        return None


def _strings(text: str) -> list[str]:
    """Read a JSON list of strings, or one item per line that has a list mark."""
    text = _thought_removed(text)
    answer = _json_of(text, "[", "]")
    if isinstance(answer, list):
        items = [item for item in answer if isinstance(item, str)]
    else:
        items = [_LIST_MARK.sub("", line) for line in text.splitlines() if _LIST_MARK.match(line)]
    return list(dict.fromkeys(item.strip() for item in items if item.strip()))


def _fenced(text: str) -> list[str]:
    """Return the bodies of markdown code fences; the last one may lack its end."""
    bodies: list[str] = []
    body: list[str] | None = None
    for line in text.splitlines():
        if not line.strip().startswith("```"):
            if body is not None:
                body.append(line)
            continue
        if body is None:
            body = [_after_fence(line)]
        else:
            bodies.append("\n".join(body))
            body = None
    if body is not None:
        bodies.append("\n".join(body))
    return bodies


def _after_fence(line: str) -> str:
    """Return SQL that stands on the line of the fence itself, as in "```sql SELECT 1```"."""
    rest = line.strip().strip("`")
    return rest[3:] if rest[:3].lower() == "sql" else (rest if _starts_like_query(rest) else "")


def _stripped(sql: str) -> str:
    return sql.strip().rstrip("; \n\t").strip()


def _starts_like_query(sql: str) -> bool:
    """Whether `sql` starts as a query does, be it right or wrong: prose may start with With."""
    try:
        tokens = sqlglot.tokenize(sql, read="sqlite")
    except SqlglotError:
        return sql.split(maxsplit=1)[0].upper() == "SELECT" if sql.strip() else False
    kinds = [token.token_type for token in tokens]
    if kinds[:1] == [TokenType.WITH]:
        return TokenType.ALIAS in kinds
    return kinds[:1] == [TokenType.SELECT]


def _trailing_query(text: str) -> str:
    """Return the first line-start from which the rest of its paragraph is a query."""
    for paragraph in reversed(text.replace("\r", "").split("\n\n")):
        lines = paragraph.splitlines()
        for index, line in enumerate(lines):
            if not _starts_like_query(line):
                continue
            sql = _stripped("\n".join(lines[index:]))
            if _is_query(sql):
                return sql
    first_line = next((line for line in text.splitlines() if _starts_like_query(line)), "")
    return _stripped(first_line)


def _is_query(sql: str) -> bool:
    try:
        return isinstance(sqlglot.parse_one(sql, read="sqlite"), exp.Query)
    except (SqlglotError, RecursionError):
        return False
