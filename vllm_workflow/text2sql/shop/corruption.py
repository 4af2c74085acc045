"""Mistakes as models make them: SQL that fails, returns nothing, or answers another question."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import TypeAlias

from vllm_workflow.text2sql.shop import database as shop

Mistake: TypeAlias = Callable[[str, str, random.Random], str]
"""From the right query, the query of another question and a source of chance to a wrong query.

Returns the right query unchanged where the mistake does not apply.
"""

COLUMNS = (
    "customers.name", "customers.city", "customers.country", "customers.segment",
    "customers.signup_year", "products.name", "products.category", "products.price",
    "products.stock", "employees.name", "employees.department", "employees.salary",
    "employees.hire_year", "orders.status", "orders.channel", "orders.order_year",
    "order_items.quantity", "order_items.unit_price", "reviews.rating", "reviews.review_year",
)  # fmt: skip
POOLS = (
    shop.CITIES,
    shop.COUNTRIES,
    shop.SEGMENTS,
    shop.CATEGORIES,
    shop.DEPARTMENTS,
    shop.STATUSES,
    shop.CHANNELS,
)
WORSE_NAMES = (
    "town", "kind", "cost", "amount", "title", "type", "date", "state", "year", "total", "id",
    "units", "income",
)  # fmt: skip
_COLUMN = re.compile(r"\b(customers|products|employees|orders|order_items|reviews)\.(\w+)")
_JOIN = re.compile(r" JOIN (\w+) ON [\w.]+ = [\w.]+")
_VALUE = re.compile(r"= '([^']+)'")
_TAIL = re.compile(r" (?:WHERE|GROUP BY|ORDER BY) ")


def _replaced(sql: str, match: re.Match[str], text: str, group: int = 0) -> str:
    return sql[: match.start(group)] + text + sql[match.end(group) :]


def _any(pattern: re.Pattern[str], sql: str, rng: random.Random) -> re.Match[str] | None:
    matches = list(pattern.finditer(sql))
    return rng.choice(matches) if matches else None


def wrong_column_name(sql: str, other: str, rng: random.Random) -> str:
    match = _any(_COLUMN, sql, rng)
    if match is None:
        return sql
    name = match.group(2)
    return _replaced(sql, match, rng.choice([name + "s", *rng.sample(WORSE_NAMES, 3)]), 2)


def column_of_other_table(sql: str, other: str, rng: random.Random) -> str:
    """Keep the column but look for it in another table, or take another column altogether."""
    match = _any(_COLUMN, sql, rng)
    if match is None:
        return sql
    if rng.random() < 0.5:
        return _replaced(sql, match, rng.choice(COLUMNS))
    return _replaced(sql, match, rng.choice(COLUMNS).split(".")[0], 1)


def missing_join(sql: str, other: str, rng: random.Random) -> str:
    match = _any(_JOIN, sql, rng)
    return _replaced(sql, match, "") if match else sql


def wrong_source(sql: str, other: str, rng: random.Random) -> str:
    match = re.search(r" FROM (\w+)", sql)
    tables = ["customers", "products", "employees", "orders", "order_items", "sales", "items"]
    return _replaced(sql, match, rng.choice(tables), 1) if match else sql


def misspelt_value(sql: str, other: str, rng: random.Random) -> str:
    match = _any(_VALUE, sql, rng)
    if match is None:
        return sql
    value = match.group(1)
    return _replaced(sql, match, rng.choice([value.swapcase(), value + "s", value[:-1]]), 1)


def value_in_other_column(sql: str, other: str, rng: random.Random) -> str:
    match = _any(re.compile(r"(\w+\.\w+) = '"), sql, rng)
    return _replaced(sql, match, rng.choice(COLUMNS), 1) if match else sql


def cut_tail(sql: str, other: str, rng: random.Random) -> str:
    words = sql.split(" ")
    return " ".join(words[: rng.randint(len(words) // 2, len(words) - 1)])


def spliced(sql: str, other: str, rng: random.Random) -> str:
    """Join the head of one query to the tail of another, either way round."""
    head, tail = (sql, other) if rng.random() < 0.5 else (other, sql)
    head_end, tail_start = _TAIL.search(head), _TAIL.search(tail)
    return (head[: head_end.start()] if head_end else head) + (
        tail[tail_start.start() :] if tail_start else ""
    )


def repeated(sql: str, other: str, rng: random.Random) -> str:
    match = _any(
        re.compile(r" (?:AND|WHERE|JOIN) .*?(?= AND | WHERE | JOIN | GROUP | ORDER |$)"), sql, rng
    )
    return _replaced(sql, match, match.group(0) * 2) if match else sql


def misspelt_keyword(sql: str, other: str, rng: random.Random) -> str:
    right, wrong = rng.choice(((" FROM ", " FORM "), (" WHERE ", " WERE "), (" BY ", " ")))
    return sql.replace(right, wrong, 1)


def other_operator(sql: str, other: str, rng: random.Random) -> str:
    match = _any(re.compile(r" (=|>|<|<>) (?=[\d'])"), sql, rng)
    if match is None:
        return sql
    return _replaced(sql, match, rng.choice([o for o in ["=", ">", "<"] if o != match[1]]), 1)


def other_number(sql: str, other: str, rng: random.Random) -> str:
    match = _any(re.compile(r"(?<=[ ])\d+"), sql, rng)
    step = rng.choice((-10, -1, 1, 10, 1000))
    return _replaced(sql, match, str(max(1, int(match[0]) + step))) if match else sql


def missing_condition(sql: str, other: str, rng: random.Random) -> str:
    shorter = re.sub(r" AND (?!\d)\S+ \S+ \S+", "", sql, count=1)
    if shorter != sql:
        return shorter
    return re.sub(r" WHERE .*?(?= GROUP BY | ORDER BY |$)", "", sql)


def other_column(sql: str, other: str, rng: random.Random) -> str:
    """Take another column of the same table, everywhere in the query."""
    match = _any(_COLUMN, sql, rng)
    if match is None:
        return sql
    same = [c for c in COLUMNS if c.split(".")[0] == match[1] and c != match[0]]
    return sql.replace(match[0], rng.choice(same)) if same else sql


def other_aggregate(sql: str, other: str, rng: random.Random) -> str:
    match = re.search(r"(AVG|MAX|MIN|SUM|COUNT)\((?!\*)", sql)
    if match is None:
        return sql
    return _replaced(
        sql, match, rng.choice([f for f in ("AVG", "MAX", "MIN", "SUM") if f != match[1]]), 1
    )


def other_direction(sql: str, other: str, rng: random.Random) -> str:
    if " DESC" in sql:
        return sql.replace(" DESC", " ASC", 1)
    return sql.replace(" ASC", " DESC", 1)


def other_value(sql: str, other: str, rng: random.Random) -> str:
    match = _any(_VALUE, sql, rng)
    if match is None:
        return sql
    for pool in POOLS:
        if match[1] in pool:
            return _replaced(sql, match, rng.choice([v for v in pool if v != match[1]]), 1)
    return sql


def other_projection(sql: str, other: str, rng: random.Random) -> str:
    """Return too little or something else of the right rows."""
    match = re.search(r"SELECT (DISTINCT )?(.*?) FROM", sql)
    if match is None:
        return sql
    columns = match[2].split(", ")
    choices = ["COUNT(*)", *columns, f"{columns[0]}, COUNT(*)"]
    if match[1]:
        return _replaced(sql, match, "", 1)
    return _replaced(sql, match, rng.choice(choices), 2)


def other_query(sql: str, other: str, rng: random.Random) -> str:
    return other


FAILING: tuple[Mistake, ...] = (
    wrong_column_name,
    column_of_other_table,
    column_of_other_table,
    missing_join,
    missing_join,
    wrong_source,
    misspelt_value,
    value_in_other_column,
    cut_tail,
    spliced,
    spliced,
    spliced,
    repeated,
    misspelt_keyword,
)
"""Mistakes after which SQLite mostly raises or finds nothing; the likelier ones twice."""

MISLEADING: tuple[Mistake, ...] = (
    other_operator,
    other_number,
    missing_condition,
    other_column,
    other_aggregate,
    other_direction,
    other_value,
    other_projection,
    other_query,
    spliced,
)
"""Mistakes after which the query mostly still runs."""


def corrupted(sql: str, other: str, rng: random.Random, mistakes: tuple[Mistake, ...]) -> str:
    """Make one mistake, sometimes two; never returns `sql` itself.

    Args:
        sql: The right query.
        other: The query of another question, for mistakes that mix two up.
        rng: Decides which mistakes.
        mistakes: Which mistakes may be made.
    """
    wrong = sql
    for _ in range(20):
        wrong = rng.choice(mistakes)(sql, other, rng)
        if rng.random() < 0.25:
            wrong = rng.choice(FAILING + MISLEADING)(wrong, other, rng)
        if wrong != sql and wrong.strip():
            return wrong
    return cut_tail(sql, other, rng)
