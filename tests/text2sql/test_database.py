"""The database fence: reading works, everything else is refused or bounded."""

from __future__ import annotations

import asyncio
import hashlib
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.text2sql.builders import execution, make_database
from vllm_workflow.core.errors import WorkflowError
from vllm_workflow.text2sql.comparison import result_key, same_result
from vllm_workflow.text2sql.database import Database, DatabaseError
from vllm_workflow.text2sql.types import ForeignKey, Status

pytestmark = pytest.mark.anyio

ENDLESS = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT {what} FROM n"
SQL_WORDS = """
SELECT INSERT DELETE FROM INTO city WITH a AS ( ) ; * , 1 'x' PRAGMA = DROP TABLE UPDATE SET name
WHERE -- /* */ " ` [ VALUES ATTACH UNION RECURSIVE REPLACE VACUUM CREATE VIEW BEGIN COMMIT
"""


@pytest.fixture(scope="module")
def db(path: Path) -> Database:
    return Database(path)


def test_a_select_gives_columns_and_rows(db: Database) -> None:
    done = db.execute("SELECT name, population FROM city ORDER BY id LIMIT 2;")

    assert done.status is Status.OK
    assert done.columns == ("name", "population")
    assert done.rows == (("New York", 8500000), ("York", 210000))
    assert not done.truncated


def test_a_select_without_rows_is_empty(db: Database) -> None:
    assert db.execute("SELECT * FROM city WHERE id > 99").status is Status.EMPTY


def test_an_error_keeps_the_words_of_sqlite(db: Database) -> None:
    assert db.execute("SELECT nam FROM city").message == "no such column: nam"
    assert 'near "FORM"' in db.execute("SELECT * FORM city").message
    assert "unrecognized token" in db.execute("SELECT 'abc").message


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT 1 -- ; DROP TABLE city",
        "SELECT ';' FROM city",
        "  \n/* why */ select 1",
        "WITH a AS (SELECT 1) SELECT * FROM a",
        "SELECT 1 UNION SELECT 2 ORDER BY 1",
        "SELECT value FROM json_each('[1, 2]')",
        "SELECT strftime('%Y', 'now')",
        "SELECT name FROM sqlite_master",
    ],
)
def test_what_only_reads_runs(db: Database, sql: str) -> None:
    done = db.execute(sql)
    assert done.ran, done.message


@pytest.mark.parametrize(
    "sql",
    [
        "",
        "   ",
        "-- nothing",
        "DELETE FROM city",
        "INSERT INTO city VALUES (9, 'x', 'y', 1)",
        "UPDATE city SET name = 'x'",
        "REPLACE INTO city VALUES (1, 'x', 'y', 1)",
        "DROP TABLE city",
        "CREATE TABLE t (a)",
        "CREATE TEMP TABLE t (a)",
        "ALTER TABLE city ADD COLUMN x",
        "VACUUM",
        "VACUUM INTO 'copy.sqlite'",
        "REINDEX",
        "ANALYZE",
        "BEGIN",
        "ATTACH 'other.sqlite' AS o",
        "DETACH main",
        "PRAGMA query_only = OFF",
        "PRAGMA table_info(city)",
        "EXPLAIN SELECT 1",
        "VALUES (1)",
        "SELECT 1; SELECT 2",
        "SELECT 1; DROP TABLE city",
        "SELECT 1;;DELETE FROM city",
        "WITH a AS (SELECT 1) DELETE FROM city",
        "WITH a AS (SELECT 1) INSERT INTO city SELECT 9, 'x', 'y', 1",
        "WITH a AS (SELECT 1) UPDATE sqlite_master SET sql = ''",
        "SELECT load_extension('x')",
        "SELECT * FROM pragma_table_info('city')",
        "SELECT * FROM pragma_query_only",
        f"SELECT {'(' * 300}1{')' * 300}",
        f"SELECT {'NOT ' * 3000}1",
        f"SELECT {'1 + ' * 30000}1",
    ],
)
def test_what_is_not_one_plain_select_is_refused(db: Database, sql: str) -> None:
    done = db.execute(sql)
    assert done.status is Status.REFUSED
    assert done.message
    assert done.rows == ()


@pytest.mark.parametrize(
    "sql",
    ["SELECT writefile('x', 'y')", "SELECT readfile('/etc/passwd')", "SELECT * INTO t FROM city"],
)
def test_what_sqlite_does_not_know_fails(db: Database, sql: str) -> None:
    assert not db.execute(sql).ran


def test_a_runaway_recursion_is_stopped(path: Path) -> None:
    start = time.monotonic()
    done = Database(path, timeout_s=0.1).execute(ENDLESS.format(what="count(*)"))

    assert done.status is Status.TIMEOUT
    assert done.message == "stopped after 0.1 s"
    assert time.monotonic() - start < 2


def test_rows_beyond_the_cap_are_not_read(path: Path) -> None:
    done = Database(path, max_rows=10).execute(ENDLESS.format(what="x"))

    assert (done.status, len(done.rows), done.truncated) == (Status.OK, 10, True)


def test_as_many_rows_as_the_cap_are_not_truncated(path: Path) -> None:
    done = Database(path, max_rows=3).execute("SELECT id FROM city")

    assert (len(done.rows), done.truncated) == (3, False)


def test_bytes_beyond_the_cap_are_not_read(path: Path) -> None:
    done = Database(path, max_bytes=1000).execute(ENDLESS.format(what="printf('%300d', x)"))

    assert (len(done.rows), done.truncated) == (3, True)


@pytest.mark.parametrize(
    "sql", ["SELECT zeroblob(1000000000)", "SELECT length(hex(randomblob(500000000)))"]
)
def test_a_huge_value_is_an_error(db: Database, sql: str) -> None:
    assert db.execute(sql).message == "string or blob too big"


def test_blobs_come_back_as_bytes(db: Database) -> None:
    assert db.execute("SELECT logo FROM shop WHERE id = 1").rows == ((b"\x00\xff",),)


def test_text_that_is_not_utf8_is_read_with_replacements(tmp_path: Path) -> None:
    path = make_database(tmp_path / "l.sqlite", "CREATE TABLE t (a); INSERT INTO t VALUES (1)")
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("UPDATE t SET a = CAST(x'e9' AS TEXT)")
        connection.commit()

    assert Database(path).execute("SELECT a FROM t").rows == (("\ufffd",),)


@given(
    st.one_of(
        st.text(),
        st.lists(
            st.sampled_from(SQL_WORDS.split()),
            max_size=12,
        ).map(" ".join),
    )
)
@settings(max_examples=150, deadline=None)
def test_no_statement_raises_or_changes_the_file(path: Path, db: Database, sql: str) -> None:
    before = hashlib.sha256(path.read_bytes()).digest()

    done = db.execute(sql)

    assert done.status in Status
    assert hashlib.sha256(path.read_bytes()).digest() == before
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


async def test_many_threads_may_execute_at_once(db: Database) -> None:
    sql = "SELECT count(*), {} FROM city"
    done = await asyncio.gather(
        *(asyncio.to_thread(db.execute, sql.format(number)) for number in range(32))
    )
    assert [each.rows for each in done] == [((3, number),) for number in range(32)]


def test_the_schema_has_types_keys_and_examples(db: Database) -> None:
    city, shop = db.schema().tables

    assert [column.name for column in city.columns] == ["id", "name", "country", "population"]
    assert city.columns[0].primary_key
    assert city.columns[1].examples == ("New York", "York", "Berlin")
    assert shop.columns[1].type == "VARCHAR(40)"
    assert shop.columns[4].examples == ()
    assert shop.foreign_keys == (ForeignKey(column="city_id", ref_table="city", ref_column="id"),)


def test_tables_may_have_any_name(tmp_path: Path) -> None:
    script = """CREATE TABLE "or""der; DROP" ("a b" TEXT, "select" INT);
                INSERT INTO "or""der; DROP" VALUES ('x', 1);
                CREATE VIEW broken AS SELECT * FROM nowhere;
                CREATE VIEW fine AS SELECT "a b" FROM "or""der; DROP";"""
    db = Database(make_database(tmp_path / "a b#c?d%20.sqlite", script))

    assert [table.name for table in db.schema().tables] == ["fine", 'or"der; DROP']
    assert db.schema().tables[1].columns[0].examples == ("x",)
    assert db.execute('SELECT "select" FROM "or""der; DROP"').rows == ((1,),)


def test_long_texts_are_no_examples(tmp_path: Path) -> None:
    script = f"CREATE TABLE t (a TEXT); INSERT INTO t VALUES ('{'x' * 5000}'), ('short');"
    db = Database(make_database(tmp_path / "t.sqlite", script))

    assert db.schema().tables[0].columns[0].examples == ("short",)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "nothing there"),
        (b"this is not a database, it is a text of some length" * 50, "file is not a database"),
        (b"", "no tables"),
    ],
)
def test_an_unusable_file_is_named_in_the_error(
    tmp_path: Path, content: bytes | None, says: str
) -> None:
    path = tmp_path / "x.sqlite"
    if content is not None:
        path.write_bytes(content)

    with pytest.raises(DatabaseError, match=says) as raised:
        Database(path)

    assert str(path) in str(raised.value)
    assert isinstance(raised.value, WorkflowError)
    assert path.exists() == (content is not None)


def test_a_directory_is_no_database(tmp_path: Path) -> None:
    with pytest.raises(DatabaseError, match="a directory"):
        Database(tmp_path)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("SELECT id FROM city", "SELECT id FROM city ORDER BY id DESC", False),
        ("SELECT id FROM city ORDER BY id DESC", "SELECT id FROM city", True),
        ("SELECT 1", "SELECT 1.0 AS other_name", True),
        ("SELECT 0.1 + 0.2", "SELECT 0.3", True),
        ("SELECT 1", "SELECT '1'", False),
        ("SELECT 1, 2", "SELECT 2, 1", False),
        ("SELECT 1 UNION ALL SELECT 1", "SELECT 1", False),
        ("SELECT NULL", "SELECT ''", False),
        ("SELECT id FROM city WHERE 0", "SELECT name FROM city WHERE 0", True),
        ("SELECT nope", "SELECT nope", False),
        ("SELECT 9007199254740993", "SELECT 9007199254740992", False),
    ],
)
def test_execution_match(db: Database, one: str, other: str, same: bool) -> None:
    """The second statement is the gold one: it decides whether order matters."""
    assert same_result(db.execute(one), db.execute(other)) is same


@given(st.permutations([(1, None), ("a", b"b"), (2.5, "x"), (True, 10**20), (float("inf"), 0)]))
def test_row_order_matters_only_under_order_by(rows: list[tuple[object, ...]]) -> None:
    sorted_once = execution(*sorted(rows, key=repr))
    assert result_key(execution(*rows)) == result_key(sorted_once)


def test_a_file_that_vanishes_is_an_error_and_is_not_made_anew(tmp_path: Path) -> None:
    path = make_database(tmp_path / "gone.sqlite")
    db = Database(path)
    path.unlink()

    assert "unable to open" in db.execute("SELECT 1 FROM city").message
    assert not path.exists()
