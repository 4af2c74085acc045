"""The values that the stages of the Text-to-SQL workflow pass to each other."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol, TypedDict


class Message(TypedDict):
    """One chat message as the OpenAI API takes it."""

    role: str
    content: str


class Stage(StrEnum):
    """The LLM stages, by the names that appear on the wire, in logs and in reports."""

    KEYWORDS = "keywords"
    SELECT_SCHEMA = "select_schema"
    GENERATE = "generate"
    REVISE = "revise"
    UNIT_TESTS = "unit_tests"
    EVALUATE = "evaluate"


class Status(StrEnum):
    """How an execution ended."""

    OK = "ok"
    EMPTY = "empty"
    ERROR = "error"
    REFUSED = "refused"
    """Not executed: the statement is not a single read-only SELECT."""
    TIMEOUT = "timeout"


@dataclass(frozen=True, slots=True, kw_only=True)
class ForeignKey:
    """`table.column` refers to `ref_table.ref_column`."""

    column: str
    ref_table: str
    ref_column: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One column with a few distinct values that occur in it."""

    name: str
    type: str
    """Declared type in upper case, e.g. `INTEGER`; empty if none was declared."""
    primary_key: bool = False
    examples: tuple[Any, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """One table of a schema."""

    name: str
    columns: tuple[Column, ...]
    foreign_keys: tuple[ForeignKey, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Schema:
    """The tables of one database, in the order of their names."""

    tables: tuple[Table, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueHit:
    """A value of the database that a keyword of the question resembles."""

    table: str
    column: str
    value: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Execution:
    """What became of one statement."""

    sql: str
    status: Status
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[Any, ...], ...] = ()
    """At most the row cap of the database."""
    truncated: bool = False
    """More rows existed than the row cap allowed."""
    message: str = ""
    """SQLite's message, or why the statement was refused; empty when it ran."""
    duration_s: float = 0.0

    @property
    def ran(self) -> bool:
        return self.status in (Status.OK, Status.EMPTY)


@dataclass(frozen=True, slots=True, kw_only=True)
class SqlCandidate:
    """One proposed answer and what executing it gave."""

    sql: str
    execution: Execution


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What every stage knows of one question."""

    question: str
    schema: Schema
    """The whole schema, or the part that schema selection kept."""
    hits: tuple[ValueHit, ...] = ()
    """Result of value retrieval."""
    evidence: str = ""
    """Free text that came with the question (BIRD's `evidence`); may be empty."""


class Executor(Protocol):
    """Executes SQL, read-only and bounded. `database.Database` is the real one."""

    def execute(self, sql: str) -> Execution:
        """Run `sql`; never raises on what a model or a client wrote."""
        ...


class PromptSet(Protocol):
    """How the stages speak to one kind of model: prompts out, answers in.

    `messages` methods return what is sent; `parse` methods never raise: an answer that
    cannot be read is an empty list or an empty string.
    """

    name: str

    def keywords(self, question: str, evidence: str) -> list[Message]:
        """Ask for the keywords, values and entities of the question."""
        ...

    def parse_keywords(self, text: str) -> list[str]: ...

    def select_schema(self, task: Task) -> list[Message] | None:
        """Ask which tables and columns are needed; None skips the stage for this task."""
        ...

    def parse_select_schema(self, text: str, schema: Schema) -> Schema:
        """Return the selected part of `schema`; all of it if the answer is unusable."""
        ...

    def generate(self, task: Task, template: int) -> list[Message]:
        """Ask for SQL with template 0 (divide and conquer) or 1 (query plan)."""
        ...

    def revise(self, task: Task, candidate: SqlCandidate) -> list[Message]:
        """Ask to correct SQL that failed or returned nothing."""
        ...

    def parse_sql(self, text: str) -> str:
        """Return the SQL of a `generate` or `revise` answer, empty if there is none."""
        ...

    def unit_tests(self, task: Task, candidates: list[SqlCandidate], count: int) -> list[Message]:
        """Ask for up to `count` tests that tell right candidates from wrong ones."""
        ...

    def parse_unit_tests(self, text: str) -> list[str]: ...

    def check(self, task: Task, test: str, candidate: SqlCandidate, db: Executor) -> bool | None:
        """Decide by parsing or executing SQL whether `candidate` passes `test`.

        None when this test cannot be decided by machine and a model has to be asked.
        """
        ...

    def evaluate(self, task: Task, candidates: list[SqlCandidate], test: str) -> list[Message]:
        """Ask which candidates pass `test`."""
        ...

    def parse_evaluate(self, text: str, num_candidates: int) -> list[bool]:
        """Return one verdict per candidate, shape (num_candidates,); False if unreadable."""
        ...
