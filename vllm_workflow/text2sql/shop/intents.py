"""What can be asked about the shop: one function per intent, from a grammar to question and SQL."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from vllm_workflow.text2sql.shop import database as shop
from vllm_workflow.text2sql.shop.phrasing import Phrasing

Intent: TypeAlias = Callable[[Phrasing], tuple[str, str]]

KEY = {
    "customers": "customer_id",
    "products": "product_id",
    "employees": "employee_id",
    "orders": "order_id",
    "reviews": "review_id",
}
ONE = {"customers": "customer", "products": "product", "employees": "employee"}
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
WITH_CUSTOMERS = " JOIN customers ON orders.customer_id = customers.customer_id"
WITH_EMPLOYEES = " JOIN employees ON orders.employee_id = employees.employee_id"
WITH_ORDERS = " JOIN orders ON order_items.order_id = orders.order_id"
WITH_PRODUCTS = " JOIN products ON order_items.product_id = products.product_id"
REVIEWED = " JOIN products ON reviews.product_id = products.product_id"
REVIEWERS = " JOIN customers ON reviews.customer_id = customers.customer_id"
REVENUE = "SUM(order_items.quantity * order_items.unit_price)"
SOME = (1, 1, 2)
FEW = (0, 1, 1)
RARE = (0, 0, 1)


def where(*conditions: str) -> str:
    """Return the WHERE clause with a leading space, or nothing."""
    return " WHERE " + " AND ".join(conditions) if conditions else ""


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


def orders_of_customers(g: Phrasing) -> tuple[str, str]:
    c, o = g.conditions("customers", SOME), g.conditions("orders", RARE)
    sql = f"SELECT COUNT(*) FROM orders{WITH_CUSTOMERS}{where(*c.sql, *o.sql)}"
    said = g.ask(
        "orders_of_customers", e=g.say("customers"), o=g.say("orders"), c=c.said, oc=o.said
    )
    return said, sql


def orders_of_employees(g: Phrasing) -> tuple[str, str]:
    c, o = g.conditions("employees", SOME), g.conditions("orders", RARE)
    sql = f"SELECT COUNT(*) FROM orders{WITH_EMPLOYEES}{where(*c.sql, *o.sql)}"
    said = g.ask(
        "orders_of_employees", e=g.say("employees"), o=g.say("orders"), c=c.said, oc=o.said
    )
    return said, sql


def revenue_of_products(g: Phrasing) -> tuple[str, str]:
    c = g.conditions("products", SOME)
    sql = f"SELECT {REVENUE} FROM order_items{WITH_PRODUCTS}{where(*c.sql)}"
    return g.ask("revenue_of_products", e=g.say("products"), c=c.said), sql


def revenue_of_orders(g: Phrasing) -> tuple[str, str]:
    o = g.conditions("orders", SOME)
    sql = f"SELECT {REVENUE} FROM order_items{WITH_ORDERS}{where(*o.sql)}"
    return g.ask("revenue_of_orders", o=g.say("orders"), oc=o.said), sql


def revenue_of_customers(g: Phrasing) -> tuple[str, str]:
    c = g.conditions("customers", SOME)
    sql = f"SELECT {REVENUE} FROM order_items{WITH_ORDERS}{WITH_CUSTOMERS}{where(*c.sql)}"
    return g.ask("revenue_of_customers", e=g.say("customers"), c=c.said), sql


def units(g: Phrasing) -> tuple[str, str]:
    c = g.conditions("products", SOME)
    sql = f"SELECT SUM(order_items.quantity) FROM order_items{WITH_PRODUCTS}{where(*c.sql)}"
    return g.ask("units", e=g.say("products"), c=c.said), sql


def _ranked(
    g: Phrasing, intent: str, table: str, source: str, measure: str, orders: bool
) -> tuple[str, str]:
    """Name the entities of `table` with the largest `measure` over the joined `source`."""
    k = g.rng.choice((1, g.rng.randint(2, 10), g.rng.randint(2, 10)))
    c = g.conditions(table, FEW)
    o = g.conditions("orders", RARE if orders else (0,))
    said = g.ask(
        intent, k, e=g.say(table), one=g.say(ONE[table]), o=g.say("orders"), c=c.said, oc=o.said
    )
    key = f"{table}.{KEY[table]}"
    sql = (
        f"SELECT {table}.name FROM {source}{where(*c.sql, *o.sql)}"
        f" GROUP BY {key} ORDER BY {measure} DESC, {key} LIMIT {k}"
    )
    return said, sql


def top_customers_orders(g: Phrasing) -> tuple[str, str]:
    source = f"orders{WITH_CUSTOMERS}"
    return _ranked(g, "top_customers_orders", "customers", source, "COUNT(*)", True)


def top_customers_spend(g: Phrasing) -> tuple[str, str]:
    source = f"order_items{WITH_ORDERS}{WITH_CUSTOMERS}"
    return _ranked(g, "top_customers_spend", "customers", source, REVENUE, False)


def top_products_revenue(g: Phrasing) -> tuple[str, str]:
    source = f"order_items{WITH_PRODUCTS}"
    return _ranked(g, "top_products_revenue", "products", source, REVENUE, False)


def top_products_units(g: Phrasing) -> tuple[str, str]:
    source = f"order_items{WITH_PRODUCTS}"
    measure = "SUM(order_items.quantity)"
    return _ranked(g, "top_products_units", "products", source, measure, False)


def top_employees(g: Phrasing) -> tuple[str, str]:
    source = f"orders{WITH_EMPLOYEES}"
    return _ranked(g, "top_employees", "employees", source, "COUNT(*)", False)


def never_ordered(g: Phrasing) -> tuple[str, str]:
    c = g.conditions("customers", FEW)
    never = "customers.customer_id NOT IN (SELECT customer_id FROM orders)"
    sql = f"SELECT customers.name FROM customers{where(*c.sql, never)}"
    return g.ask("never_ordered", e=g.say("customers"), o=g.say("orders"), c=c.said), sql


def never_sold(g: Phrasing) -> tuple[str, str]:
    c = g.conditions("products", FEW)
    never = "products.product_id NOT IN (SELECT product_id FROM order_items)"
    sql = f"SELECT products.name FROM products{where(*c.sql, never)}"
    return g.ask("never_sold", e=g.say("products"), c=c.said), sql


def _person(g: Phrasing) -> str:
    return g.text_value([f"{g.rng.choice(shop.FIRST_NAMES)} {g.rng.choice(shop.LAST_NAMES)}"])


def _product_name(g: Phrasing) -> str:
    noun = g.rng.choice(shop.NOUNS[g.rng.choice(shop.CATEGORIES)])
    return g.text_value([f"{g.rng.choice(shop.ADJECTIVES)} {noun}"])


def attribute(g: Phrasing) -> tuple[str, str]:
    table = g.rng.choice(NAMED)
    name = _product_name(g) if table == "products" else _person(g)
    column = g.rng.choice(NUMBERS.get(table, ()) + GROUPS[table])
    one = g.say(ONE[table])
    if table == "employees":  # without the word a person is taken for a customer
        said = g.say("show") + f" the {g.say(column)} of {one} {name}."
    else:
        said = g.ask("attribute", one=one, n=g.say(column), v=name)
    return said, f"SELECT {table}.{column} FROM {table} WHERE {table}.name = '{name}'"


def orders_of_person(g: Phrasing) -> tuple[str, str]:
    name, o = _person(g), g.conditions("orders", RARE)
    chosen = where(f"customers.name = '{name}'", *o.sql)
    said = g.ask("orders_of_person", v=name, o=g.say("orders"), oc=o.said)
    return said, f"SELECT COUNT(*) FROM orders{WITH_CUSTOMERS}{chosen}"


def spend_of_person(g: Phrasing) -> tuple[str, str]:
    name, o = _person(g), g.conditions("orders", RARE)
    chosen = where(f"customers.name = '{name}'", *o.sql)
    on = f" {g.pick(('on', 'for'))} {g.say('orders')}{o.said}" if o.said else ""
    said = g.ask("spend_of_person", v=name, oc=on)
    return said, f"SELECT {REVENUE} FROM order_items{WITH_ORDERS}{WITH_CUSTOMERS}{chosen}"


def bought_by_person(g: Phrasing) -> tuple[str, str]:
    name, o = _person(g), g.conditions("orders", RARE)
    chosen = where(f"customers.name = '{name}'", *o.sql)
    through = f" {g.pick(('in', 'with'))} {g.say('orders')}{o.said}" if o.said else ""
    said = g.ask("bought_by_person", v=name, e=g.say("products"), oc=through)
    source = f"order_items{WITH_PRODUCTS}{WITH_ORDERS}{WITH_CUSTOMERS}"
    return said, f"SELECT DISTINCT products.name FROM {source}{chosen}"


def buyers_of(g: Phrasing) -> tuple[str, str]:
    c = g.conditions("products", SOME)
    said = g.ask("buyers_of", b=g.say("customers"), e=g.say("products"), c=c.said)
    if g.rng.random() < 0.4:
        name = _product_name(g)
        said = g.ask("buyers_of", b=g.say("customers"), e=f"the {name}", c="")
        c_sql: tuple[str, ...] = (f"products.name = '{name}'",)
    else:
        c_sql = c.sql
    source = f"order_items{WITH_PRODUCTS}{WITH_ORDERS}{WITH_CUSTOMERS}"
    return said, f"SELECT DISTINCT customers.name FROM {source}{where(*c_sql)}"


def revenue_by(g: Phrasing) -> tuple[str, str]:
    o = g.conditions("orders", RARE)
    group, joins = g.rng.choice(
        (
            ("products.category", WITH_PRODUCTS + (WITH_ORDERS if o.sql else "")),
            ("customers.country", WITH_ORDERS + WITH_CUSTOMERS),
            ("customers.segment", WITH_ORDERS + WITH_CUSTOMERS),
            ("orders.channel", WITH_ORDERS),
            ("orders.order_year", WITH_ORDERS),
        )
    )
    sql = f"SELECT {group}, {REVENUE} FROM order_items{joins}{where(*o.sql)} GROUP BY {group}"
    said = g.ask("revenue_by", o=g.say("orders"), oc=o.said, g=g.say(group.split(".")[1]))
    return said, sql


def average_rating(g: Phrasing) -> tuple[str, str]:
    if g.rng.random() < 0.4:
        name = _product_name(g)
        said = g.ask("average_rating", e=f"the {name}", c="", r=g.say("reviews"))
        chosen = where(f"products.name = '{name}'")
    else:
        c = g.conditions("products", SOME)
        said = g.ask("average_rating", e=g.say("products"), c=c.said, r=g.say("reviews"))
        chosen = where(*c.sql)
    return said, f"SELECT AVG(reviews.rating) FROM reviews{REVIEWED}{chosen}"


def reviews_of_product(g: Phrasing) -> tuple[str, str]:
    name, r = _product_name(g), g.conditions("reviews", RARE)
    said = g.ask("reviews_of_product", v=name, r=g.say("reviews"), rc=r.said)
    chosen = where(f"products.name = '{name}'", *r.sql)
    return said, f"SELECT COUNT(*) FROM reviews{REVIEWED}{chosen}"


def reviews_of_customers(g: Phrasing) -> tuple[str, str]:
    c, r = g.conditions("customers", SOME), g.conditions("reviews", RARE)
    said = g.ask(
        "reviews_of_customers", e=g.say("customers"), r=g.say("reviews"), c=c.said, rc=r.said
    )
    return said, f"SELECT COUNT(*) FROM reviews{REVIEWERS}{where(*c.sql, *r.sql)}"


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
    "orders_of_customers": (orders_of_customers, 4),
    "orders_of_employees": (orders_of_employees, 3),
    "revenue_of_products": (revenue_of_products, 3),
    "revenue_of_orders": (revenue_of_orders, 3),
    "revenue_of_customers": (revenue_of_customers, 3),
    "units": (units, 3),
    "top_customers_orders": (top_customers_orders, 3),
    "top_customers_spend": (top_customers_spend, 2),
    "top_products_revenue": (top_products_revenue, 2),
    "top_products_units": (top_products_units, 2),
    "top_employees": (top_employees, 2),
    "never_ordered": (never_ordered, 2),
    "never_sold": (never_sold, 2),
    "attribute": (attribute, 4),
    "orders_of_person": (orders_of_person, 2),
    "spend_of_person": (spend_of_person, 2),
    "bought_by_person": (bought_by_person, 2),
    "buyers_of": (buyers_of, 3),
    "revenue_by": (revenue_by, 3),
    "average_rating": (average_rating, 3),
    "reviews_of_product": (reviews_of_product, 2),
    "reviews_of_customers": (reviews_of_customers, 2),
}
"""Every intent with its weight in the draw."""
