"""The router's database: what survives, and what is done with a file that cannot be used."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest

from vllm_workflow.core.errors import ConfigError
from vllm_workflow.core.events import Marked, to_json
from vllm_workflow.router import store_schema
from vllm_workflow.router.store import Retention, Store, StoreReader, is_store

WRITER = """
import sys, time
from pathlib import Path
from vllm_workflow.core.events import Marked
from vllm_workflow.router.store import Store

store = Store(Path(sys.argv[1]))
for number in range(1_000_000):
    store.record(Marked(instance_id=str(number), healthy=True))
    store.keep("lengths", {"number": number})
    print(number, time.monotonic(), flush=True)
    time.sleep(0.001)
"""


def event(name: str) -> Marked:
    return Marked(instance_id=name, healthy=True)


def test_what_was_kept_is_there_after_a_restart(tmp_path: Path):
    path = tmp_path / "state.db"
    store = Store(path)
    store.record(event("a"))
    store.record(event("b"))
    store.keep("lengths", {"mean": 1.5})
    store.keep("lengths", {"mean": 2.5})
    store.tuned({"gain": 0.1})
    store.used("acme", prompt_tokens=10, output_tokens=2, service_s=0.5)
    store.used("acme", prompt_tokens=30, output_tokens=4, service_s=1.0)
    store.close()
    again = Store(path)
    again.used("acme", prompt_tokens=1, output_tokens=1, service_s=0.25)
    again.close()

    with StoreReader(path) as reader:
        assert list(reader.events()) == [to_json(event("a")), to_json(event("b"))]
        assert reader.learned("lengths") == {"mean": 2.5}
        assert reader.learned("speeds") is None
        assert reader.tunings() == [{"gain": 0.1}]
        (usage,) = reader.usage()
    del usage["day"]
    assert usage == {
        "tenant": "acme",
        "calls": 3,
        "prompt_tokens": 41,
        "output_tokens": 7,
        "service_s": 1.75,
    }
    assert is_store(path)


@pytest.mark.parametrize("seed", range(3))
def test_a_killed_router_leaves_a_readable_database_and_loses_a_second_at_most(
    tmp_path: Path, seed: int
):
    path = tmp_path / "state.db"
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        lives_until = time.monotonic() + random.Random(seed).uniform(1.2, 2.2)
        lines = []
        while time.monotonic() < lives_until:
            lines.append(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
        killed_at = time.monotonic()
        lines += process.stdout.readlines()
    given = [line.split() for line in lines if line.endswith("\n")]
    long_ago = [int(number) for number, at in given if float(at) < killed_at - 1.0]
    assert long_ago, "nothing was given a second before the end"

    with StoreReader(path) as reader:
        kept = list(reader.events())
        learned = reader.learned("lengths")

    assert kept == [to_json(event(str(number))) for number in range(len(kept))]
    assert len(kept) > max(long_ago)
    assert learned is not None
    assert learned["number"] >= max(long_ago)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"not a database, but a note to self " * 100, "not a database"),
        (b"SQLite format 3\0" + bytes(range(256)) * 20, ""),
    ],
)
def test_a_file_that_is_no_database_is_moved_aside_and_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes, problem: str
):
    path = tmp_path / "state.db"
    path.write_bytes(content)

    store = Store(path)
    store.keep("lengths", {"mean": 1.0})
    store.close()

    (aside,) = tmp_path.glob("state.db.unusable-*")
    assert aside.read_bytes() == content
    assert "cannot be used" in caplog.text
    assert problem in caplog.text
    assert str(aside) in caplog.text
    with StoreReader(path) as reader:
        assert reader.learned("lengths") == {"mean": 1.0}


def test_somebody_elses_database_is_moved_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    path = tmp_path / "state.db"
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE customers (name TEXT)")
    other.close()

    Store(path).close()

    assert "expected a router's database" in caplog.text
    (aside,) = tmp_path.glob("state.db.unusable-*")
    with sqlite3.connect(aside) as other:
        assert other.execute("SELECT count(*) FROM customers").fetchone() == (0,)
    other.close()


def test_a_damaged_page_is_found_at_the_start(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    path = tmp_path / "state.db"
    store = Store(path)
    for number in range(2_000):
        store.record(event(f"instance-{number}"))
    store.close()
    content = bytearray(path.read_bytes())
    content[4096 * 4 : 4096 * 8] = b"\xff" * 4096 * 4
    path.write_bytes(content)

    Store(path).close()

    assert "cannot be used" in caplog.text
    assert list(tmp_path.glob("state.db.unusable-*"))


def test_a_table_that_is_another_one_is_found_at_the_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """SQLite sees nothing wrong with it; every write would fail, and nothing would be learned."""
    path = tmp_path / "state.db"
    Store(path).close()
    path.write_bytes(path.read_bytes().replace(b"service_s REAL", b"servicf_s REAL"))

    store = Store(path)
    store.used("acme", prompt_tokens=1, output_tokens=1, service_s=1.0)
    store.close()

    assert store.num_dropped == 0
    assert "its usage is not that of version" in caplog.text
    assert list(tmp_path.glob("state.db.unusable-*"))


def test_a_file_that_says_that_it_is_not_to_be_written_is_moved_aside(tmp_path: Path):
    """Its 19th byte, of a format that SQLite can read only: nothing would ever be kept."""
    path = tmp_path / "state.db"
    Store(path).close()
    with path.open("r+b") as file:
        file.seek(18)
        file.write(b"\xff")

    store = Store(path)
    store.keep("lengths", {"mean": 1.0})
    store.close()

    assert store.num_dropped == 0
    assert list(tmp_path.glob("state.db.unusable-*"))


def test_what_somebody_has_added_stays(tmp_path: Path):
    path = tmp_path / "state.db"
    Store(path).close()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE VIEW busy AS SELECT tenant FROM usage")

    Store(path).close()

    assert not list(tmp_path.glob("state.db.unusable-*"))


@pytest.mark.parametrize("value", ["{", "[1]", "9" * 5000, "[" * 100_000])
def test_a_reader_says_what_it_cannot_read(tmp_path: Path, value: str):
    path = tmp_path / "state.db"
    Store(path).close()
    with sqlite3.connect(path) as connection:
        connection.execute("INSERT INTO learned VALUES ('lengths', ?, 0)", (value,))
        connection.execute("INSERT INTO tunings (time, value) VALUES (0, ?)", (value,))
    connection.close()

    with StoreReader(path) as reader:
        with pytest.raises(ConfigError, match=r"state.db: learned: lengths: expected"):
            reader.learned("lengths")
        with pytest.raises(ConfigError, match=r"state.db: tunings: expected"):
            reader.tunings()


def test_a_database_of_an_earlier_version_is_brought_up_with_what_is_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "state.db"
    with monkeypatch.context() as before:
        before.setattr(store_schema, "MIGRATIONS", store_schema.MIGRATIONS[:1])
        store = Store(path)
        store.record(event("a"))
        store.close()
    with sqlite3.connect(path) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (1,)
    connection.close()

    Store(path).close()

    with StoreReader(path) as reader:
        assert list(reader.events()) == [to_json(event("a"))]
    with sqlite3.connect(path) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (store_schema.VERSION,)
    connection.close()


def test_a_database_of_a_later_version_is_not_touched(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    path = tmp_path / "state.db"
    Store(path).close()
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()

    Store(path).close()

    assert f"expected version {store_schema.VERSION} at most, got 99" in caplog.text
    (aside,) = tmp_path.glob("state.db.unusable-*")
    with pytest.raises(ConfigError, match="got 99"):
        StoreReader(aside)


def test_a_full_queue_drops_and_counts_and_never_blocks(tmp_path: Path):
    store = Store(tmp_path / "state.db", max_queued=10)
    blocker = sqlite3.connect(tmp_path / "state.db", isolation_level=None)
    blocker.execute("BEGIN EXCLUSIVE")  # the writer cannot go on

    begin = time.perf_counter()
    num_given = 50_000
    for number in range(num_given):
        store.record(event(str(number)))
    took_s = time.perf_counter() - begin

    blocker.execute("COMMIT")
    blocker.close()
    store.close()
    assert store.num_dropped > 0
    assert store.num_written + store.num_dropped == num_given
    assert took_s / num_given < 0.001
    with StoreReader(tmp_path / "state.db") as reader:
        assert len(list(reader.events())) == store.num_written


def test_old_events_go_and_the_latest_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "state.db"
    store = Store(path)
    for number in range(100):
        store.record(event(str(number)))
    store.close()
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE events SET time = time - 86400 * 3 WHERE number <= 30")
    connection.close()

    store = Store(path, Retention(days=2.0, max_events=50))
    until = time.monotonic() + 10.0
    kept: list[str] = []
    while time.monotonic() < until and len(kept) != 50:
        with StoreReader(path) as reader:
            kept = list(reader.events())
    store.close()

    assert kept == [to_json(event(str(number))) for number in range(50, 100)]


def test_a_file_of_a_router_that_runs_is_left_to_it(tmp_path: Path):
    path = tmp_path / "state.db"
    store = Store(path)
    with pytest.raises(ConfigError, match=rf"store: {path} is in use by .* process {os.getpid()};"):
        Store(path)
    store.record(event("a"))
    store.close()

    Store(path).close()
    assert not list(tmp_path.glob("*.unusable-*"))
    with StoreReader(path) as reader:
        assert list(reader.events()) == [to_json(event("a"))]


def test_a_file_of_a_killed_router_is_free(tmp_path: Path):
    path = tmp_path / "state.db"
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(ConfigError, match=f"process {process.pid};"):
            Store(path)
        process.kill()
        process.wait()

    Store(path).close()


def test_a_file_that_another_program_has_locked_is_not_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "state.db"
    Store(path).close()
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("PRAGMA locking_mode = EXCLUSIVE")
        other.execute("BEGIN EXCLUSIVE")
        monkeypatch.setattr(sqlite3, "connect", partial(sqlite3.connect, timeout=0.05))
        with pytest.raises(ConfigError, match=rf"store: cannot use {path}: database is locked"):
            Store(path)
    assert not list(tmp_path.glob("*.unusable-*"))
    Store(path).close()


def test_a_folder_that_cannot_be_written_is_an_error_at_the_start(tmp_path: Path):
    with pytest.raises(ConfigError, match="store: cannot use"):
        Store(tmp_path / "nowhere" / "state.db")


def test_a_reader_says_what_is_wrong_with_a_file(tmp_path: Path):
    with pytest.raises(ConfigError, match="no such file"):
        StoreReader(tmp_path / "state.db")
    (tmp_path / "note").write_text("a note")
    with pytest.raises(ConfigError, match="cannot read store"):
        StoreReader(tmp_path / "note")
    assert not is_store(tmp_path / "note")
    assert not is_store(tmp_path / "state.db")


def test_reading_does_not_keep_the_router_from_writing(tmp_path: Path):
    path = tmp_path / "state.db"
    store = Store(path)
    for name in ("a", "b"):
        store.record(event(name))
    until = time.monotonic() + 10.0
    while store.num_written < 2 and time.monotonic() < until:
        pass
    with StoreReader(path) as reader, closing(reader.events()) as lines:
        next(lines)
        store.record(event("c"))
        store.close()
    assert (store.num_written, store.num_dropped) == (3, 0)


def test_what_cannot_be_written_is_counted_and_the_rest_is_kept(tmp_path: Path):
    path = tmp_path / "state.db"
    store = Store(path)
    store.keep("lengths", {"mean": 1.0})
    until = time.monotonic() + 10.0
    while store.num_written < 1 and time.monotonic() < until:
        pass
    store.tuned({"not": object()})  # type: ignore[dict-item]
    while store.num_dropped < 1 and time.monotonic() < until:
        pass
    store.used("acme", prompt_tokens=1, output_tokens=1, service_s=float("nan"))
    while store.num_dropped < 2 and time.monotonic() < until:
        pass
    store.record(event("a"))
    store.close()

    assert (store.num_dropped, store.num_written) == (2, 2)
    assert not list(tmp_path.glob("*unusable*"))
    with StoreReader(path) as reader:
        assert reader.learned("lengths") == {"mean": 1.0}
        assert list(reader.events()) == [to_json(event("a"))]
