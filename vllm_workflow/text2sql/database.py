"""One SQLite file, read-only and bounded: what a model writes cannot harm it or hang it."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_workflow.core.errors import ConfigError
from vllm_workflow.text2sql.statement import why_refused
from vllm_workflow.text2sql.types import Column, Execution, ForeignKey, Schema, Status, Table

_ALLOWED_ACTIONS = frozenset(
    {
        sqlite3.SQLITE_SELECT,
        sqlite3.SQLITE_READ,
        sqlite3.SQLITE_FUNCTION,
        sqlite3.SQLITE_RECURSIVE,
    }
)
_BOOKKEEPING = frozenset(
    {(sqlite3.SQLITE_UPDATE, "sqlite_master"), (sqlite3.SQLITE_PRAGMA, "data_version")}
)
"""What SQLite asks for when a SELECT reads `json_each(...)` or a full-text table. It writes
nothing: the file is open read-only, and `sqlite_master` cannot be updated by a statement."""

_ACTION_NAMES = {
    sqlite3.SQLITE_ATTACH: "ATTACH",
    sqlite3.SQLITE_DETACH: "DETACH",
    sqlite3.SQLITE_PRAGMA: "PRAGMA",
    sqlite3.SQLITE_INSERT: "INSERT",
    sqlite3.SQLITE_UPDATE: "UPDATE",
    sqlite3.SQLITE_DELETE: "DELETE",
    sqlite3.SQLITE_TRANSACTION: "a transaction",
}
_DENIED_FUNCTIONS = frozenset(
    {"load_extension", "readfile", "writefile", "edit", "fts3_tokenizer", "sqlar_uncompress"}
)

_OPCODES_BETWEEN_CLOCK_READS = 2_000
"""About 20 microseconds of SQLite's virtual machine."""

_ROWS_SEEN_FOR_EXAMPLES = 10_000
_MAX_EXAMPLE_LENGTH = 60


class DatabaseError(ConfigError):
    """The file cannot be used as a database."""


@dataclass(frozen=True, slots=True)
class _Fetched:
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    truncated: bool


class Database:
    """Executes single SELECT statements of one SQLite file; implements `Executor`.

    Four fences that do not rely on each other: the statement is parsed and refused unless it
    is one SELECT; the file is opened with `mode=ro`; `PRAGMA query_only` is on; and an
    authorizer denies every action but selecting, reading and calling harmless functions.
    The file never changes; beside one in WAL mode SQLite may put its `-shm` and `-wal` files.

    Each call opens its own connection (about 0.1 ms), so one object may be used by any
    number of threads at once, and from asyncio with `asyncio.to_thread`.

    Args:
        path: The SQLite file. It must exist and hold at least one table or view.
        timeout_s: A statement is stopped after this many seconds (`Status.TIMEOUT`).
        max_rows: Rows beyond this many are not read; `Execution.truncated` tells.
        max_bytes: The same for the size of a result, and the most that a single value
            may have, also in between.

    Raises:
        DatabaseError: The file is missing, is not a SQLite database or holds no tables.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        timeout_s: float = 5.0,
        max_rows: int = 1000,
        max_bytes: int = 4_000_000,
    ) -> None:
        self.path = Path(path)
        self.timeout_s = timeout_s
        self.max_rows = max_rows
        self.max_bytes = max_bytes
        self._schema: Schema | None = None
        self._schema_lock = threading.Lock()
        self._check_file()

    def execute(self, sql: str) -> Execution:
        """Run `sql`; never raises on what a model or a client wrote."""
        start = time.monotonic()
        reason = why_refused(sql)
        if reason:
            return Execution(sql=sql, status=Status.REFUSED, message=reason)
        denied: list[str] = []
        try:
            with self._connection() as connection:
                connection.set_authorizer(_authorizer(denied))
                connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, self.max_bytes)
                connection.setlimit(sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH, 1_000)
                connection.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
                fetched = self._fetch(connection, sql, (), self.max_rows)
        except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError, MemoryError) as error:
            return Execution(
                sql=sql,
                duration_s=time.monotonic() - start,
                **self._failure(error, denied),
            )
        return Execution(
            sql=sql,
            status=Status.OK if fetched.rows else Status.EMPTY,
            columns=fetched.columns,
            rows=fetched.rows,
            truncated=fetched.truncated,
            duration_s=time.monotonic() - start,
        )

    def schema(self, *, num_examples: int = 3) -> Schema:
        """Return all tables and views with up to `num_examples` values of each column.

        Read once; later calls return the first answer. Columns of a view that SQLite
        cannot resolve are left out together with the view.

        Raises:
            DatabaseError: SQLite cannot read the file.
        """
        with self._schema_lock:
            if self._schema is None:
                self._schema = self._read_schema(num_examples)
            return self._schema

    def distinct_values(self, table: str, column: str, *, limit: int, max_length: int) -> list[str]:
        """Return up to `limit` distinct texts of a column; empty if it takes too long."""
        name = quoted(column)
        return self._texts(
            f"SELECT DISTINCT {name} FROM {quoted(table)}"
            f" WHERE typeof({name}) = 'text' AND length({name}) BETWEEN 1 AND {int(max_length)}",
            (),
            limit,
        )

    def matching_values(
        self, table: str, column: str, phrases: Sequence[str], *, limit: int
    ) -> list[str]:
        """Return up to `limit` distinct values that equal one of `phrases`, ignoring ASCII case."""
        marks = ", ".join("?" * len(phrases))
        return self._texts(
            f"SELECT DISTINCT {quoted(column)} FROM {quoted(table)}"
            f" WHERE {quoted(column)} COLLATE NOCASE IN ({marks})",
            phrases,
            limit,
        )

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        """Open the file read-only with the time limit set; close it however the block ends."""
        uri = f"{self.path.resolve().as_uri()}?mode=ro"
        with closing(sqlite3.connect(uri, uri=True, timeout=self.timeout_s)) as connection:
            connection.isolation_level = None
            connection.text_factory = lambda raw: raw.decode("utf-8", "replace")
            connection.execute("PRAGMA query_only = ON")
            connection.execute("PRAGMA trusted_schema = OFF")
            deadline = time.monotonic() + self.timeout_s
            connection.set_progress_handler(
                lambda: time.monotonic() > deadline, _OPCODES_BETWEEN_CLOCK_READS
            )
            yield connection

    def _fetch(
        self,
        connection: sqlite3.Connection,
        sql: str,
        parameters: Sequence[str],
        max_rows: int,
    ) -> _Fetched:
        with closing(connection.cursor()) as cursor:
            cursor.execute(sql, parameters)
            columns = tuple(str(entry[0]) for entry in cursor.description or ())
            rows: list[tuple[Any, ...]] = []
            num_bytes = 0
            for row in cursor:
                num_bytes += sum(_num_bytes(cell) for cell in row)
                if len(rows) == max_rows or num_bytes > self.max_bytes:
                    return _Fetched(columns, tuple(rows), truncated=True)
                rows.append(tuple(row))
        return _Fetched(columns, tuple(rows), truncated=False)

    def _failure(self, error: BaseException, denied: list[str]) -> dict[str, Any]:
        """Return status and message of a statement that raised."""
        if denied:
            return {"status": Status.REFUSED, "message": f"not allowed here: {denied[0]}"}
        code = getattr(error, "sqlite_errorcode", None)
        if code == sqlite3.SQLITE_INTERRUPT:
            message = f"stopped after {self.timeout_s:g} s"
            return {"status": Status.TIMEOUT, "message": message}
        return {"status": Status.ERROR, "message": str(error) or type(error).__name__}

    def _texts(self, sql: str, parameters: Sequence[str], limit: int) -> list[str]:
        try:
            with self._connection() as connection:
                fetched = self._fetch(connection, sql, parameters, limit)
        except sqlite3.Error:
            return []
        return [row[0] for row in fetched.rows if isinstance(row[0], str)]

    def _check_file(self) -> None:
        if not self.path.is_file():
            got = "a directory" if self.path.is_dir() else "nothing there"
            raise DatabaseError(f"database {self.path}: {got}; wanted an existing SQLite file")
        try:
            with self._connection() as connection:
                row = connection.execute(
                    "SELECT count(*) FROM sqlite_master WHERE type IN ('table', 'view')"
                ).fetchone()
        except sqlite3.Error as error:
            raise DatabaseError(
                f"database {self.path}: SQLite says {str(error)!r}; wanted a readable SQLite file"
            ) from error
        if not row[0]:
            raise DatabaseError(f"database {self.path}: no tables; wanted at least one table")

    def _read_schema(self, num_examples: int) -> Schema:
        tables = []
        try:
            with self._connection() as connection:
                names = connection.execute(
                    "SELECT name, type FROM sqlite_master WHERE type IN ('table', 'view')"
                    " AND name NOT LIKE 'sqlite\\_%' ESCAPE '\\' ORDER BY name"
                ).fetchall()
            for name, kind in names:
                try:
                    tables.append(self._read_table(name, num_examples))
                except sqlite3.Error:
                    if kind == "table":
                        raise
        except sqlite3.Error as error:
            raise DatabaseError(f"database {self.path}: cannot read the schema: {error}") from error
        return Schema(tables=tuple(tables))

    def _read_table(self, name: str, num_examples: int) -> Table:
        with self._connection() as connection:
            described = connection.execute(f"PRAGMA table_info({quoted(name)})").fetchall()
            references = connection.execute(f"PRAGMA foreign_key_list({quoted(name)})").fetchall()
        columns = tuple(
            Column(
                name=column,
                type=str(declared).upper(),
                primary_key=bool(key),
                examples=self._examples(name, column, num_examples),
            )
            for _, column, declared, _, _, key in described
        )
        foreign_keys = tuple(
            ForeignKey(column=column, ref_table=table, ref_column=self._referred(table, target))
            for _, _, table, column, target, *_ in sorted(references)
        )
        return Table(name=name, columns=columns, foreign_keys=foreign_keys)

    def _referred(self, table: str, column: str | None) -> str:
        """Return the column a foreign key means; SQLite leaves it out for the primary key."""
        if column is not None:
            return column
        with self._connection() as connection:
            described = connection.execute(f"PRAGMA table_info({quoted(table)})").fetchall()
        return next((entry[1] for entry in described if entry[5]), "rowid")

    def _examples(self, table: str, column: str, num_examples: int) -> tuple[Any, ...]:
        """Return the first distinct short values of the first rows; blobs and NULL never."""
        name = quoted(column)
        sql = (
            f"SELECT DISTINCT {name} FROM (SELECT {name} FROM {quoted(table)}"
            f" LIMIT {_ROWS_SEEN_FOR_EXAMPLES})"
            f" WHERE typeof({name}) IN ('integer', 'real', 'text')"
            f" AND length({name}) BETWEEN 1 AND {_MAX_EXAMPLE_LENGTH}"
        )
        try:
            with self._connection() as connection:
                fetched = self._fetch(connection, sql, (), num_examples)
        except sqlite3.Error:
            return ()
        return tuple(row[0] for row in fetched.rows)


def quoted(name: str) -> str:
    """Return `name` as a quoted SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def _authorizer(denied: list[str]) -> Callable[..., int]:
    """Return a callback that allows reading alone and appends what it denies to `denied`."""

    def authorize(action: int, first: str | None, second: str | None, *_: str | None) -> int:
        if action == sqlite3.SQLITE_FUNCTION and (second or "").lower() in _DENIED_FUNCTIONS:
            denied.append(f"function {second}")
            return sqlite3.SQLITE_DENY
        if action in _ALLOWED_ACTIONS or (action, first) in _BOOKKEEPING:
            return sqlite3.SQLITE_OK
        denied.append(_ACTION_NAMES.get(action, f"SQLite action {action}"))
        return sqlite3.SQLITE_DENY

    return authorize


def _num_bytes(cell: object) -> int:
    return len(cell) if isinstance(cell, (str, bytes)) else 8
