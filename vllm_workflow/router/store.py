"""What a router keeps beyond its own life: learned state, history, usage, the decision log.

One thread writes, off the event loop. What it is given waits in a bounded queue; when that is
full, the newest is dropped and counted, so that a slow disk never slows a call. What has been
written is at most `COMMIT_S` behind.
"""

from __future__ import annotations

import json
import logging
import queue
import sqlite3
import threading
import time
from collections.abc import Generator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_workflow.core.errors import ConfigError
from vllm_workflow.core.events import Event, to_json
from vllm_workflow.router.file_lock import FileLock
from vllm_workflow.router.store_schema import NotOursError, checked, moved_aside, opened

COMMIT_S = 0.5
MAX_QUEUED = 20_000
_PRUNE_S = 60.0
_DAY_S = 86_400.0
_MAX_PRUNED = 5_000
"""Rows removed at a time: the writer is not to be kept from writing."""
_MAX_LEARNED = 20_000
"""Parts of what was learned; who learns them forgets the oldest far below that."""
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """What is kept, at most."""

    days: float = 14.0
    """Age of events, tunings and usage."""
    max_events: int = 1_000_000


@dataclass(slots=True)
class _Usage:
    calls: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    service_s: float = 0.0


@dataclass(slots=True)
class _Batch:
    events: list[tuple[float, Event]] = field(default_factory=list)
    learned: dict[str, tuple[float, Mapping[str, Any]]] = field(default_factory=dict)
    tunings: list[tuple[float, Mapping[str, Any]]] = field(default_factory=list)
    usage: dict[tuple[str, str], _Usage] = field(default_factory=dict)


class Store:
    """A router's database, open for writing.

    Args:
        path: Made if it is not there; what is there and cannot be used is moved aside.
        retention: What is kept.
        max_queued: Items that may wait to be written.

    Raises:
        ConfigError: The folder cannot be written, or another router has the file.
    """

    def __init__(
        self, path: Path, retention: Retention | None = None, *, max_queued: int = MAX_QUEUED
    ) -> None:
        self.path = path
        self.num_dropped = 0
        """Items that were not written: the queue was full, or the disk."""
        self.num_losses = 0
        """Times that something learned was lost: of what was kept before, too, if the file was
        begun anew."""
        self.num_written = 0
        self.retention = retention or Retention()
        """May be replaced."""
        self._lock = FileLock(path, what="store")
        try:
            self._connection = opened(path)
        except BaseException:
            self._lock.close()
            raise
        self._queue: queue.Queue[tuple[str, float, Any] | None] = queue.Queue(max_queued)
        self._last_pruned = 0.0
        self._thread = threading.Thread(target=self._run, name="store", daemon=True)
        self._thread.start()

    def record(self, event: Event) -> None:
        """Keep an event of the decision log. Never blocks."""
        self._put("event", event)

    def keep(self, kind: str, learned: Mapping[str, Any]) -> None:
        """Keep the latest state of something learned in the place of the one before.

        Args:
            kind: What it is.
            learned: Plain data; not changed afterwards.
        """
        if not self._put("learned", (kind, learned)):
            self.num_losses += 1

    def tuned(self, verdict: Mapping[str, Any]) -> None:
        """Add what the tuner has found."""
        self._put("tuning", verdict)

    def used(
        self, tenant: str, *, prompt_tokens: int, output_tokens: int, service_s: float
    ) -> None:
        """Add one call to what a tenant has used today (UTC)."""
        self._put("usage", (tenant, prompt_tokens, output_tokens, service_s))

    def close(self) -> None:
        """Write what waits, and close. Blocks."""
        while self._thread.is_alive():
            with suppress(queue.Full):
                self._queue.put(None, timeout=COMMIT_S)
                break
        self._thread.join()
        self._connection.close()
        self._lock.close()

    def _put(self, kind: str, value: object) -> bool:
        """Have it written; returns whether it will be tried."""
        try:
            self._queue.put_nowait((kind, time.time(), value))
        except queue.Full:
            self.num_dropped += 1
            return False
        return True

    # In the writer's thread.

    def _run(self) -> None:
        goes_on = True
        while goes_on:
            batch = _Batch()
            goes_on, num_items = self._collect(batch)
            if num_items:
                self._write(batch, num_items)
            if time.monotonic() - self._last_pruned > _PRUNE_S:
                self._last_pruned = time.monotonic()
                self._guarded(self._prune, 0)

    def _collect(self, batch: _Batch) -> tuple[bool, int]:
        """Take what comes within `COMMIT_S`; returns whether there will be more, and how many."""
        end_time = time.monotonic() + COMMIT_S
        num_items = 0
        while (left_s := end_time - time.monotonic()) > 0.0:
            try:
                item = self._queue.get(timeout=left_s)
            except queue.Empty:
                break
            if item is None:
                return False, num_items
            num_items += 1
            _add(batch, *item)
        return True, num_items

    def _write(self, batch: _Batch, num_items: int) -> None:
        if self._guarded(lambda: _insert(self._connection, batch), num_items):
            self.num_written += num_items
        elif batch.learned:
            self.num_losses += 1

    def _guarded(self, do: Any, num_items: int) -> bool:
        """Do something in one transaction; returns whether it was done."""
        try:
            with self._connection:
                self._connection.execute("BEGIN")
                do()
        except Exception as e:  # whatever it was given, the writer goes on
            self.num_dropped += num_items
            _logger.exception("store: lost %d items for %s", num_items, self.path)
            # Its kinds are about one statement, or a lock; a message that quotes damage is no text.
            if type(e) in {sqlite3.DatabaseError, UnicodeDecodeError}:
                self._begin_anew()
            return False
        return True

    def _begin_anew(self) -> None:
        """The database is damaged: keep it for whoever wants to look, and go on with a new one."""
        try:
            self._connection.close()
            aside = moved_aside(self.path)
            self._connection = opened(self.path)
            self.num_losses += 1
            _logger.error("store: %s is damaged; moved to %s", self.path, aside)
        except (ConfigError, OSError, sqlite3.Error):
            _logger.exception("store: cannot begin %s anew", self.path)

    def _prune(self) -> None:
        keep = self.retention
        oldest = time.time() - keep.days * _DAY_S
        for table in ("events", "tunings"):
            self._connection.execute(
                f"DELETE FROM {table} WHERE number IN "
                f"(SELECT number FROM {table} WHERE time < ? ORDER BY number LIMIT ?)",
                (oldest, _MAX_PRUNED),
            )
        (last,) = self._connection.execute("SELECT max(number) FROM events").fetchone()
        self._connection.execute(
            "DELETE FROM events WHERE number IN "
            "(SELECT number FROM events WHERE number <= ? ORDER BY number LIMIT ?)",
            ((last or 0) - keep.max_events, _MAX_PRUNED),
        )
        self._connection.execute("DELETE FROM usage WHERE day < ?", (_day(oldest),))
        self._connection.execute(
            "DELETE FROM learned WHERE kind IN "
            "(SELECT kind FROM learned ORDER BY time DESC LIMIT -1 OFFSET ?)",
            (_MAX_LEARNED,),
        )


def _add(batch: _Batch, kind: str, at: float, value: Any) -> None:
    match kind:
        case "event":
            batch.events.append((at, value))
        case "learned":
            batch.learned[value[0]] = at, value[1]
        case "tuning":
            batch.tunings.append((at, value))
        case "usage":
            tenant, prompt_tokens, output_tokens, service_s = value
            usage = batch.usage.setdefault((_day(at), tenant), _Usage())
            usage.calls += 1
            usage.prompt_tokens += prompt_tokens
            usage.output_tokens += output_tokens
            usage.service_s += service_s


def _insert(connection: sqlite3.Connection, batch: _Batch) -> None:
    connection.executemany(
        "INSERT INTO events (time, kind, value) VALUES (?, ?, ?)",
        ((at, type(event).__name__, to_json(event)) for at, event in batch.events),
    )
    connection.executemany(
        "INSERT OR REPLACE INTO learned (kind, time, value) VALUES (?, ?, ?)",
        ((kind, at, json.dumps(value)) for kind, (at, value) in batch.learned.items()),
    )
    connection.executemany(
        "INSERT INTO tunings (time, value) VALUES (?, ?)",
        ((at, json.dumps(value)) for at, value in batch.tunings),
    )
    connection.executemany(
        "INSERT INTO usage VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET "
        "calls = calls + excluded.calls, prompt_tokens = prompt_tokens + excluded.prompt_tokens, "
        "output_tokens = output_tokens + excluded.output_tokens, "
        "service_s = service_s + excluded.service_s",
        (
            (day, tenant, u.calls, u.prompt_tokens, u.output_tokens, u.service_s)
            for (day, tenant), u in batch.usage.items()
        ),
    )


def _day(at: float) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(at))


class StoreReader:
    """A router's database, for reading; the router may be writing it.

    Raises:
        ConfigError: It cannot be read, or is none.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            # A copy of a database that was in use has a WAL, which SQLite cannot read read-only
            # unless it may make its index: `mode=ro` would refuse it.
            if not path.is_file():
                raise NotOursError("no such file")
            self._connection = sqlite3.connect(path)
            self._connection.execute("PRAGMA query_only = ON")
            checked(self._connection)
        except (sqlite3.Error, NotOursError) as e:
            raise ConfigError(f"{path}: cannot read store: {e}") from None

    def __enter__(self) -> StoreReader:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._connection.close()

    def learned(self, kind: str) -> Mapping[str, Any] | None:
        """Return the latest state of something learned, None if there is none."""
        rows = list(self._rows("SELECT value FROM learned WHERE kind = ?", kind))
        return self._members(rows[0][0], f"learned: {kind}") if rows else None

    def learned_parts(self, kind: str) -> list[tuple[str, Mapping[str, Any]]]:
        """Return what was kept under `part_of(kind, …)`, that longest without news first.

        What cannot be read is left out, and the log says so.
        """
        first, last = part_of(kind, ""), part_of(kind, chr(0x10FFFF))
        parts = []
        for name, value in list(
            self._rows(
                "SELECT kind, value FROM learned WHERE kind > ? AND kind < ? ORDER BY time",
                first,
                last,
            )
        ):
            try:
                parts.append((name.removeprefix(first), self._members(value, name)))
            except ConfigError as e:
                _logger.error("store: left out: %s", e)
        return parts

    def events(self) -> Generator[str]:
        """Yield the lines of the decision log, in order."""
        for (value,) in self._rows("SELECT value FROM events ORDER BY number"):
            yield value

    def latest_events(self, last_s: float) -> Generator[str]:
        """Yield the lines that were recorded in the `last_s` seconds before the last one."""
        for (value,) in self._rows(
            "SELECT value FROM events WHERE time >= (SELECT max(time) FROM events) - ? "
            "ORDER BY number",
            last_s,
        ):
            yield value

    def tunings(self) -> list[Mapping[str, Any]]:
        """Return what the tuner has found, in order."""
        return [
            self._members(value, "tunings")
            for (value,) in list(self._rows("SELECT value FROM tunings ORDER BY number"))
        ]

    def usage(self) -> list[dict[str, Any]]:
        """Return what tenants have used, by day (UTC) and tenant."""
        names = ("day", "tenant", "calls", "prompt_tokens", "output_tokens", "service_s")
        return [
            dict(zip(names, row, strict=True))
            for row in self._rows("SELECT * FROM usage ORDER BY day, tenant")
        ]

    def _members(self, value: Any, where: str) -> Mapping[str, Any]:
        """Read a JSON object.

        Raises:
            ConfigError: It is none: SQLite notices damage to its own pages, not to what is on them.
        """
        try:
            members = json.loads(value)
        except (ValueError, TypeError, RecursionError) as e:
            raise ConfigError(f"{self._path}: {where}: expected JSON: {e}") from None
        if not isinstance(members, dict):
            raise ConfigError(f"{self._path}: {where}: expected an object, got {members!r:.80}")
        return members

    def _rows(self, statement: str, *values: object) -> Generator[Any]:
        try:
            with closing(self._connection.execute(statement, values)) as cursor:
                yield from cursor
        except sqlite3.Error as e:
            raise ConfigError(f"{self._path}: cannot read store: {e}") from None


def part_of(kind: str, part: str) -> str:
    """Return the kind under which one of very many parts of something learned is kept."""
    return f"{kind}/{part}"


def is_store(path: Path) -> bool:
    """Whether a file is an SQLite database, by its first bytes."""
    try:
        with path.open("rb") as file:
            return file.read(16) == b"SQLite format 3\0"
    except OSError:
        return False
