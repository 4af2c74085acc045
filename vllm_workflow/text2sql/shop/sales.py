"""Intents about what was ordered, by whom and for how much, and how it was reviewed."""

from __future__ import annotations

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

WITH_CUSTOMERS = " JOIN customers ON orders.customer_id = customers.customer_id"
WITH_EMPLOYEES = " JOIN employees ON orders.employee_id = employees.employee_id"
WITH_ORDERS = " JOIN orders ON order_items.order_id = orders.order_id"
WITH_PRODUCTS = " JOIN products ON order_items.product_id = products.product_id"
REVIEWED = " JOIN products ON reviews.product_id = products.product_id"
REVIEWERS = " JOIN customers ON reviews.customer_id = customers.customer_id"
REVENUE = "SUM(order_items.quantity * order_items.unit_price)"


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


def orders_of_person(g: Phrasing) -> tuple[str, str]:
    name, o = person(g), g.conditions("orders", RARE)
    chosen = where(f"customers.name = '{name}'", *o.sql)
    said = g.ask("orders_of_person", v=name, o=g.say("orders"), oc=o.said)
    return said, f"SELECT COUNT(*) FROM orders{WITH_CUSTOMERS}{chosen}"


def spend_of_person(g: Phrasing) -> tuple[str, str]:
    name, o = person(g), g.conditions("orders", RARE)
    chosen = where(f"customers.name = '{name}'", *o.sql)
    on = f" {g.pick(('on', 'for'))} {g.say('orders')}{o.said}" if o.said else ""
    said = g.ask("spend_of_person", v=name, oc=on)
    return said, f"SELECT {REVENUE} FROM order_items{WITH_ORDERS}{WITH_CUSTOMERS}{chosen}"


def bought_by_person(g: Phrasing) -> tuple[str, str]:
    name, o = person(g), g.conditions("orders", RARE)
    chosen = where(f"customers.name = '{name}'", *o.sql)
    through = f" {g.pick(('in', 'with'))} {g.say('orders')}{o.said}" if o.said else ""
    said = g.ask("bought_by_person", v=name, e=g.say("products"), oc=through)
    source = f"order_items{WITH_PRODUCTS}{WITH_ORDERS}{WITH_CUSTOMERS}"
    return said, f"SELECT DISTINCT products.name FROM {source}{chosen}"


def buyers_of(g: Phrasing) -> tuple[str, str]:
    c = g.conditions("products", SOME)
    said = g.ask("buyers_of", b=g.say("customers"), e=g.say("products"), c=c.said)
    if g.rng.random() < 0.4:
        name = product_name(g)
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
        name = product_name(g)
        said = g.ask("average_rating", e=f"the {name}", c="", r=g.say("reviews"))
        chosen = where(f"products.name = '{name}'")
    else:
        c = g.conditions("products", SOME)
        said = g.ask("average_rating", e=g.say("products"), c=c.said, r=g.say("reviews"))
        chosen = where(*c.sql)
    return said, f"SELECT AVG(reviews.rating) FROM reviews{REVIEWED}{chosen}"


def reviews_of_product(g: Phrasing) -> tuple[str, str]:
    name, r = product_name(g), g.conditions("reviews", RARE)
    said = g.ask("reviews_of_product", v=name, r=g.say("reviews"), rc=r.said)
    chosen = where(f"products.name = '{name}'", *r.sql)
    return said, f"SELECT COUNT(*) FROM reviews{REVIEWED}{chosen}"


def reviews_of_customers(g: Phrasing) -> tuple[str, str]:
    c, r = g.conditions("customers", SOME), g.conditions("reviews", RARE)
    said = g.ask(
        "reviews_of_customers", e=g.say("customers"), r=g.say("reviews"), c=c.said, rc=r.said
    )
    return said, f"SELECT COUNT(*) FROM reviews{REVIEWERS}{where(*c.sql, *r.sql)}"
