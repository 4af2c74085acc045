"""What can be asked about one table of the shop, and all that can be asked: question and SQL."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from vllm_workflow.text2sql.shop import sales
from vllm_workflow.text2sql.shop.clauses import (
    FEW,
    KEY,
    ONE,
    RARE,
    SOME,
    person,
    product_name,
    where,
)
from vllm_workflow.text2sql.shop.phrasing import Phrasing

Intent: TypeAlias = Callable[[Phrasing], tuple[str, str]]

NAMED = ("customers", "products", "employees")
NUMBERS = {"products": ("price", "stock"), "employees": ("salary",)}
GROUPS = {
    "customers": ("city", "country", "segment", "signup_year"),
    "products": ("category",),
    "employees": ("department", "hire_year"),
    "orders": ("status", "channel", "order_year"),
    "reviews": ("rating", "review_year"),
}
PLURAL = {
    "city": "cities",
    "country": "countries",
    "segment": "segments",
    "category": "categories",
    "department": "departments",
    "channel": "channels",
    "status": "statuses",
}
PLURAL_GROUPS = tuple(
    (table, group) for table, groups in GROUPS.items() for group in groups if group in PLURAL
)


def count(g: Phrasing) -> tuple[str, str]:
    table = g.rng.choice(list(KEY))
    c = g.conditions(table)
    sql = f"SELECT COUNT(*) FROM {table}{where(*c.sql)}"
    return g.ask("count", e=g.say(table), c=c.said), sql


def list_names(g: Phrasing) -> tuple[str, str]:
    table = g.rng.choice(NAMED)
    c = g.conditions(table, SOME)
    sql = f"SELECT {table}.name FROM {table}{where(*c.sql)}"
    return g.ask("list", e=g.say(table), c=c.said), sql


def list_pair(g: Phrasing) -> tuple[str, str]:
    table = g.rng.choice(NAMED)
    column = g.rng.choice(NUMBERS.get(table, ()) + GROUPS[table])
    c = g.conditions(table, SOME)
    sql = f"SELECT {table}.name, {table}.{column} FROM {table}{where(*c.sql)}"
    return g.ask("pair", e=g.say(table), n=g.say(column), c=c.said), sql


def distinct(g: Phrasing) -> tuple[str, str]:
    table, group = g.rng.choice(PLURAL_GROUPS)
    c = g.conditions(table, FEW)
    sql = f"SELECT DISTINCT {table}.{group} FROM {table}{where(*c.sql)}"
    return g.ask("distinct", e=g.say(table), gs=g.say(PLURAL[group]), c=c.said), sql


def aggregate(g: Phrasing) -> tuple[str, str]:
    table = g.rng.choice(("products", "products", "employees"))
    column = g.rng.choice(NUMBERS[table])
    function = g.rng.choice(("AVG", "MAX", "MIN", "SUM"))
    c = g.conditions(table)
    sql = f"SELECT {function}({table}.{column}) FROM {table}{where(*c.sql)}"
    said = g.ask("aggregate", e=g.say(table), n=g.say(column), w=g.say(function), c=c.said)
    return said, sql


def group_count(g: Phrasing) -> tuple[str, str]:
    table = g.rng.choice(list(GROUPS))
    group = g.rng.choice(GROUPS[table])
    c = g.conditions(table, RARE)
    column = f"{table}.{group}"
    sql = f"SELECT {column}, COUNT(*) FROM {table}{where(*c.sql)} GROUP BY {column}"
    return g.ask("group", e=g.say(table), g=g.say(group), c=c.said), sql


def group_aggregate(g: Phrasing) -> tuple[str, str]:
    table, group = g.rng.choice(
        (("products", "category"), ("employees", "department"), ("employees", "hire_year"))
    )
    number = g.rng.choice(NUMBERS[table])
    function = g.rng.choice(("AVG", "MAX", "MIN", "SUM"))
    c = g.conditions(table, RARE)
    column = f"{table}.{group}"
    sql = (
        f"SELECT {column}, {function}({table}.{number}) FROM {table}{where(*c.sql)}"
        f" GROUP BY {column}"
    )
    said = g.ask(
        "group_aggregate",
        e=g.say(table),
        g=g.say(group),
        n=g.say(number),
        w=g.say(function),
        c=c.said,
    )
    return said, sql


def top(g: Phrasing) -> tuple[str, str]:
    table = g.rng.choice(("products", "products", "employees"))
    number = g.rng.choice(NUMBERS[table])
    direction, word = g.rng.choice((("DESC", "MAX"), ("ASC", "MIN")))
    k = g.rng.choice((1, g.rng.randint(2, 15), g.rng.randint(2, 15)))
    c = g.conditions(table, FEW)
    intent = "top"
    special = {"price DESC": "top_expensive", "price ASC": "top_cheap", "salary DESC": "top_paid"}
    if g.rng.random() < 0.4:
        intent = special.get(f"{number} {direction}", "top")
    said = g.ask(
        intent, k, e=g.say(table), one=g.say(ONE[table]), n=g.say(number), w=g.say(word), c=c.said
    )
    sql = (
        f"SELECT {table}.name FROM {table}{where(*c.sql)}"
        f" ORDER BY {table}.{number} {direction}, {table}.{KEY[table]} LIMIT {k}"
    )
    return said, sql


def superlative_group(g: Phrasing) -> tuple[str, str]:
    table, group = g.rng.choice(PLURAL_GROUPS)
    direction, word = g.rng.choice((("DESC", "most"), ("DESC", "most"), ("ASC", "fewest")))
    c = g.conditions(table, RARE)
    column = f"{table}.{group}"
    sql = (
        f"SELECT {column} FROM {table}{where(*c.sql)}"
        f" GROUP BY {column} ORDER BY COUNT(*) {direction}, {column} LIMIT 1"
    )
    said = g.ask(
        "superlative_group",
        e=g.say(table),
        g=g.say(group),
        gs=g.say(PLURAL[group]),
        m=g.say(word),
        c=c.said,
    )
    return said, sql


def having(g: Phrasing) -> tuple[str, str]:
    table, group = g.rng.choice(PLURAL_GROUPS)
    operator = g.rng.choice((">", "<"))
    k = g.rng.randint(2, 200 if table == "orders" else 40)
    c = g.conditions(table, RARE)
    column = f"{table}.{group}"
    sql = (
        f"SELECT {column} FROM {table}{where(*c.sql)}"
        f" GROUP BY {column} HAVING COUNT(*) {operator} {k}"
    )
    said = g.ask("having", k, e=g.say(table), gs=g.say(PLURAL[group]), w=g.say(operator), c=c.said)
    return said, sql


def than_average(g: Phrasing) -> tuple[str, str]:
    table = g.rng.choice(("products", "employees"))
    number = g.rng.choice(NUMBERS[table])
    operator, word = g.rng.choice(((">", "gt"), ("<", "lt")))
    c = g.conditions(table, FEW)
    average = f"{table}.{number} {operator} (SELECT AVG({number}) FROM {table})"
    sql = f"SELECT {table}.name FROM {table}{where(*c.sql, average)}"
    said = g.ask("than_average", e=g.say(table), n=g.say(number), w=g.say(word), c=c.said)
    return said, sql


def attribute(g: Phrasing) -> tuple[str, str]:
    table = g.rng.choice(NAMED)
    name = product_name(g) if table == "products" else person(g)
    column = g.rng.choice(NUMBERS.get(table, ()) + GROUPS[table])
    one = g.say(ONE[table])
    if table == "employees":  # without the word a person is taken for a customer
        said = g.say("show") + f" the {g.say(column)} of {one} {name}."
    else:
        said = g.ask("attribute", one=one, n=g.say(column), v=name)
    return said, f"SELECT {table}.{column} FROM {table} WHERE {table}.name = '{name}'"


INTENTS: dict[str, tuple[Intent, int]] = {
    "count": (count, 7),
    "list": (list_names, 6),
    "pair": (list_pair, 3),
    "distinct": (distinct, 3),
    "aggregate": (aggregate, 6),
    "group": (group_count, 5),
    "group_aggregate": (group_aggregate, 3),
    "top": (top, 6),
    "superlative_group": (superlative_group, 4),
    "having": (having, 4),
    "than_average": (than_average, 3),
    "orders_of_customers": (sales.orders_of_customers, 4),
    "orders_of_employees": (sales.orders_of_employees, 3),
    "revenue_of_products": (sales.revenue_of_products, 3),
    "revenue_of_orders": (sales.revenue_of_orders, 3),
    "revenue_of_customers": (sales.revenue_of_customers, 3),
    "units": (sales.units, 3),
    "top_customers_orders": (sales.top_customers_orders, 3),
    "top_customers_spend": (sales.top_customers_spend, 2),
    "top_products_revenue": (sales.top_products_revenue, 2),
    "top_products_units": (sales.top_products_units, 2),
    "top_employees": (sales.top_employees, 2),
    "never_ordered": (sales.never_ordered, 2),
    "never_sold": (sales.never_sold, 2),
    "attribute": (attribute, 4),
    "orders_of_person": (sales.orders_of_person, 2),
    "spend_of_person": (sales.spend_of_person, 2),
    "bought_by_person": (sales.bought_by_person, 2),
    "buyers_of": (sales.buyers_of, 3),
    "revenue_by": (sales.revenue_by, 3),
    "average_rating": (sales.average_rating, 3),
    "reviews_of_product": (sales.reviews_of_product, 2),
    "reviews_of_customers": (sales.reviews_of_customers, 2),
}
"""Every intent with its weight in the draw."""
