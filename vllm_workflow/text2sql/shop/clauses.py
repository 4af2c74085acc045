"""What intents share: conditions, names of people and products, and how many conditions to ask."""

from __future__ import annotations

from vllm_workflow.text2sql.shop import database as shop
from vllm_workflow.text2sql.shop.phrasing import Phrasing

KEY = {
    "customers": "customer_id",
    "products": "product_id",
    "employees": "employee_id",
    "orders": "order_id",
    "reviews": "review_id",
}
ONE = {"customers": "customer", "products": "product", "employees": "employee"}
SOME = (1, 1, 2)
FEW = (0, 1, 1)
RARE = (0, 0, 1)


def where(*conditions: str) -> str:
    """Return the WHERE clause with a leading space, or nothing."""
    return " WHERE " + " AND ".join(conditions) if conditions else ""


def person(g: Phrasing) -> str:
    return g.text_value([f"{g.rng.choice(shop.FIRST_NAMES)} {g.rng.choice(shop.LAST_NAMES)}"])


def product_name(g: Phrasing) -> str:
    noun = g.rng.choice(shop.NOUNS[g.rng.choice(shop.CATEGORIES)])
    return g.text_value([f"{g.rng.choice(shop.ADJECTIVES)} {noun}"])
