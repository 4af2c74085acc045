"""A small database and values with a default for every field."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

from vllm_workflow.text2sql.types import Execution, SqlCandidate, Status

SCRIPT = """
CREATE TABLE city (id INTEGER PRIMARY KEY, name TEXT, country TEXT, population INTEGER);
CREATE TABLE shop (id INTEGER PRIMARY KEY, name VARCHAR(40), city_id INTEGER REFERENCES city,
                   rating REAL, logo BLOB);
INSERT INTO city VALUES (1, 'New York', 'USA', 8500000), (2, 'York', 'UK', 210000),
                        (3, 'Berlin', 'Germany', 3700000);
INSERT INTO shop VALUES (1, 'Blue Bottle', 1, 4.5, x'00ff'), (2, 'Betty''s', 2, 4.8, NULL),
                        (3, 'Kaffee Mitte', 3, 4.1, NULL), (4, 'Kaffee Ost', 3, NULL, NULL);
"""


def make_database(path: Path, script: str = SCRIPT) -> Path:
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(script)
    return path


def execution(*rows: tuple[Any, ...], **fields: Any) -> Execution:
    status = Status.OK if rows else Status.EMPTY
    columns = tuple(f"c{index}" for index in range(len(rows[0]))) if rows else ("c0",)
    defaults = {"sql": "SELECT 1", "status": status, "columns": columns, "rows": rows}
    return Execution(**{**defaults, **fields})


def candidate(*rows: tuple[Any, ...], **fields: Any) -> SqlCandidate:
    done = execution(*rows, **fields)
    return SqlCandidate(sql=done.sql, execution=done)
