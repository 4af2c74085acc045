"""The database that a router keeps: its tables, its versions, and what to do with another file."""

from __future__ import annotations

import logging
import os
import sqlite3
import time
from contextlib import closing
from pathlib import Path

from vllm_workflow.core.errors import ConfigError

APPLICATION_ID = 0x76774C66
"""In the file's header: whose database it is."""
MIGRATIONS: tuple[str, ...] = (
    """
    CREATE TABLE learned (kind TEXT PRIMARY KEY, value TEXT NOT NULL, time REAL NOT NULL);
    CREATE TABLE events (
        number INTEGER PRIMARY KEY, time REAL NOT NULL, kind TEXT NOT NULL, value TEXT NOT NULL
    );
    CREATE TABLE tunings (number INTEGER PRIMARY KEY, time REAL NOT NULL, value TEXT NOT NULL);
    CREATE TABLE usage (
        day TEXT NOT NULL, tenant TEXT NOT NULL, calls INTEGER NOT NULL,
        prompt_tokens INTEGER NOT NULL, output_tokens INTEGER NOT NULL, service_s REAL NOT NULL,
        PRIMARY KEY (day, tenant)
    ) WITHOUT ROWID;
    """,
    "CREATE INDEX events_by_time ON events (time);",
)
"""Each takes a database one version further; what is released is never changed."""
VERSION = len(MIGRATIONS)
_MAX_CHECKED_BYTES = 1 << 27
"""Larger databases are not read through at the start; damage shows when it is met."""
_SIDE_FILES = ("-wal", "-shm")
_logger = logging.getLogger(__name__)


class NotOursError(ValueError):
    """A file that is no database of a router, or of a version that is not known."""


def opened(path: Path) -> sqlite3.Connection:
    """Open a database for its one writer, make it first, or bring it up to `VERSION`.

    What cannot be used is moved aside, so that a router starts in any case; the log says so.

    Raises:
        ConfigError: The folder cannot be written.
    """
    try:
        return _migrated(path)
    except (NotOursError, sqlite3.DatabaseError) as e:
        if isinstance(e, sqlite3.OperationalError) and not _is_about_content(e, path):
            raise ConfigError(f"store: cannot use {path}: {e}") from None
        aside = moved_aside(path)
        _logger.error("store: %s cannot be used: %s; moved to %s, starting anew", path, e, aside)
    try:
        return _migrated(path)
    except sqlite3.Error as e:
        raise ConfigError(f"store: cannot use {path}: {e}") from None


def _is_about_content(error: sqlite3.OperationalError, path: Path) -> bool:
    """Whether an error is not one of the folder, a lock, or the disk: these have codes of their
    own. A file that may be written, and is not to be, says so itself."""
    code = error.sqlite_errorcode & 0xFF
    if code == sqlite3.SQLITE_READONLY:
        return os.access(path, os.W_OK) and os.access(path.parent, os.W_OK)
    return code == sqlite3.SQLITE_ERROR


def moved_aside(path: Path) -> Path:
    """Give a file and what SQLite keeps beside it another name; return that name."""
    aside = path.with_name(f"{path.name}.unusable-{time.time_ns()}")
    path.rename(aside)
    for suffix in _SIDE_FILES:
        side = path.with_name(path.name + suffix)
        if side.exists():
            side.rename(aside.with_name(aside.name + suffix))
    return aside


def checked(connection: sqlite3.Connection) -> int:
    """Return the version of a router's database; 0 of an empty file.

    Raises:
        NotOursError: It is somebody else's, or of a later version.
        sqlite3.DatabaseError: It is damaged.
    """
    try:
        return _version(connection)
    except UnicodeDecodeError as e:  # SQLite quotes what it cannot read
        raise sqlite3.DatabaseError(f"damaged: {e}") from None


def _version(connection: sqlite3.Connection) -> int:
    (application_id,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (num_tables,) = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    if not num_tables and not application_id:
        return 0
    if application_id != APPLICATION_ID:
        raise NotOursError(
            f"expected a router's database, application id {APPLICATION_ID:#x}, "
            f"got {application_id:#x}"
        )
    if version > VERSION:
        raise NotOursError(f"expected version {VERSION} at most, got {version}")
    (num_bytes,) = connection.execute(
        "SELECT page_count * page_size FROM pragma_page_count, pragma_page_size"
    ).fetchone()
    if missing := _schema_of(version) - _schema(connection):
        name = min(missing)[0].decode()
        raise sqlite3.DatabaseError(f"damaged: its {name} is not that of version {version}")
    if num_bytes > _MAX_CHECKED_BYTES:
        return int(version)
    (problem,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if problem != "ok":
        raise sqlite3.DatabaseError(problem)
    return int(version)


def _schema(connection: sqlite3.Connection) -> set[tuple[bytes, bytes]]:
    """Return the names of tables and indices, and how they were made; damaged, they are no text."""
    return set(
        connection.execute(
            "SELECT CAST(name AS BLOB), CAST(sql AS BLOB) FROM sqlite_schema WHERE sql IS NOT NULL"
        )
    )


def _schema_of(version: int) -> set[tuple[bytes, bytes]]:
    """Return what a database of a version has at least."""
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
        for script in MIGRATIONS[:version]:
            connection.executescript(script)
        return _schema(connection)


def _migrated(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    try:
        version = checked(connection)
        if version == 0:
            # Both must come before the first table, and cannot be in a transaction.
            connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute("PRAGMA journal_mode = WAL")
        # With a WAL this can lose the last transactions to a power cut, never the database; a
        # killed process loses nothing that it has committed.
        connection.execute("PRAGMA synchronous = NORMAL")
        for number, script in enumerate(MIGRATIONS[version:], start=version + 1):
            connection.executescript(f"BEGIN; {script} PRAGMA user_version = {number}; COMMIT;")
        # If it cannot be written, this says so, and not each write from then on.
        connection.execute(f"PRAGMA user_version = {max(version, len(MIGRATIONS))}")
    except BaseException:
        connection.close()
        raise
    return connection
