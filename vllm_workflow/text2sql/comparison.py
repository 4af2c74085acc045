"""When two results count as the same answer: the one place that decides it."""

from __future__ import annotations

import math
from collections.abc import Hashable
from functools import lru_cache

import sqlglot
from sqlglot import exp
from sqlglot.errors import SqlglotError

from vllm_workflow.text2sql.types import Execution

_SIGNIFICANT_DIGITS = 9
"""Sums of the same floats in another order differ in the last of about 16 digits."""


@lru_cache(maxsize=1024)
def is_ordered(sql: str) -> bool:
    """Whether the outermost query of `sql` has an ORDER BY; False if it cannot be read."""
    try:
        statement = sqlglot.parse_one(sql, read="sqlite")
    except (SqlglotError, RecursionError):
        return False
    return isinstance(statement, exp.Query) and statement.args.get("order") is not None


def result_key(execution: Execution, *, ordered: bool | None = None) -> Hashable:
    """Return a value that is equal for two executions exactly if they gave the same answer.

    Column names do not matter, column order does, duplicates do. Row order matters if
    `ordered`, by default if the statement has an ORDER BY. Numbers are compared to nine
    significant digits and 2 equals 2.0. All failures of one status are the same.
    """
    if not execution.ran:
        return (execution.status.value,)
    rows = [tuple(_cell_key(cell) for cell in row) for row in execution.rows]
    if ordered is None:
        ordered = is_ordered(execution.sql)
    if not ordered or len(rows) < 2:
        rows.sort()
        ordered = False
    return (execution.truncated, ordered, tuple(rows))


def same_result(got: Execution, gold: Execution) -> bool:
    """Whether `got` answers what `gold` answers (execution match).

    The gold statement decides whether row order matters. A failure never matches.
    """
    if not (got.ran and gold.ran):
        return False
    ordered = is_ordered(gold.sql)
    return result_key(got, ordered=ordered) == result_key(gold, ordered=ordered)


def _cell_key(cell: object) -> tuple[int, float, str]:
    """Return (kind, number, text): comparable between cells of any two types."""
    if cell is None:
        return (0, 0.0, "")
    if isinstance(cell, int) and abs(cell) >= 10**15:
        return (1, float(cell), str(cell))
    if isinstance(cell, (int, float)):
        number = float(cell)
        if math.isfinite(number):
            number = float(f"{number:.{_SIGNIFICANT_DIGITS}g}")
        return (1, number + 0.0, "")
    if isinstance(cell, bytes):
        return (3, 0.0, cell.hex())
    return (2, 0.0, str(cell))
