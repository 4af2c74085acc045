"""The shop database: six tables of invented business data, the same for the same seed."""

from __future__ import annotations

import random
import sqlite3
from pathlib import Path
from typing import Any, TypeAlias

SCHEMA = """
CREATE TABLE customers (customer_id INTEGER PRIMARY KEY, name TEXT, city TEXT, country TEXT,
  segment TEXT, signup_year INTEGER);
CREATE TABLE employees (employee_id INTEGER PRIMARY KEY, name TEXT, department TEXT,
  salary INTEGER, hire_year INTEGER);
CREATE TABLE order_items (item_id INTEGER PRIMARY KEY, order_id INTEGER REFERENCES orders(order_id),
  product_id INTEGER REFERENCES products(product_id), quantity INTEGER, unit_price REAL);
CREATE TABLE orders (order_id INTEGER PRIMARY KEY,
  customer_id INTEGER REFERENCES customers(customer_id),
  employee_id INTEGER REFERENCES employees(employee_id),
  order_year INTEGER, status TEXT, channel TEXT);
CREATE TABLE products (product_id INTEGER PRIMARY KEY, name TEXT, category TEXT, price REAL,
  stock INTEGER);
CREATE TABLE reviews (review_id INTEGER PRIMARY KEY,
  product_id INTEGER REFERENCES products(product_id),
  customer_id INTEGER REFERENCES customers(customer_id), rating INTEGER, review_year INTEGER);
"""

COUNTRY_OF = {
    city: country
    for country, cities in {
        "France": ("Paris", "Lyon", "Nice"),
        "Germany": ("Berlin", "Munich", "Hamburg"),
        "UK": ("London", "Leeds", "Bristol"),
        "Spain": ("Madrid", "Seville", "Valencia"),
        "Italy": ("Rome", "Milan", "Turin"),
        "Portugal": ("Lisbon", "Porto"),
        "Austria": ("Vienna", "Graz"),
        "Norway": ("Oslo", "Bergen"),
        "Ireland": ("Dublin", "Cork"),
        "Switzerland": ("Zurich", "Geneva"),
    }.items()
    for city in cities
}
CITIES = tuple(COUNTRY_OF)
COUNTRIES = tuple(sorted(set(COUNTRY_OF.values())))
SEGMENTS = ("consumer", "corporate", "education", "government")
DEPARTMENTS = ("sales", "support", "marketing", "finance", "logistics")
STATUSES = ("shipped", "pending", "cancelled", "returned")
CHANNELS = ("web", "store", "phone", "mobile")
NOUNS = {
    "books": ("Atlas", "Novel", "Cookbook"),
    "toys": ("Robot", "Puzzle", "Kite"),
    "garden": ("Shovel", "Hose", "Planter"),
    "kitchen": ("Kettle", "Toaster", "Pan"),
    "sports": ("Racket", "Ball", "Helmet"),
    "music": ("Guitar", "Drum", "Flute"),
    "office": ("Stapler", "Desk", "Lamp"),
    "outdoor": ("Tent", "Stove", "Lantern"),
}
CATEGORIES = tuple(NOUNS)
ADJECTIVES = (
    "Classic", "Compact", "Deluxe", "Eco", "Giant", "Mini", "Nordic", "Portable", "Premium",
    "Retro", "Smart", "Ultra",
)  # fmt: skip
FIRST_NAMES = (
    "Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana", "Ivo", "Jana", "Karl", "Lena",
    "Milo", "Nora", "Otto", "Pia", "Quin", "Rosa", "Sven", "Tara", "Udo", "Vera", "Walt", "Xena",
    "Yuri", "Zoe",
)  # fmt: skip
LAST_NAMES = (
    "Abel", "Brandt", "Costa", "Duval", "Engel", "Ferro", "Grant", "Holm", "Iversen", "Jensen",
    "Klein", "Lopez", "Moreau", "Novak", "Olsen", "Perez", "Rossi", "Silva", "Torres", "Urban",
    "Vogel", "Weber", "Young", "Zeller",
)  # fmt: skip

NUM_CUSTOMERS = 240
NUM_EMPLOYEES = 40
NUM_PRODUCTS = 120
NUM_ORDERS = 900
NUM_REVIEWS = 600
NUM_WITHOUT_SALES = 20
"""Customers and products at the end of their tables that never occur in an order."""

Row: TypeAlias = tuple[Any, ...]


def build(path: str | Path = ":memory:", *, seed: int = 7) -> sqlite3.Connection:
    """Write the shop database to `path` and return the open connection.

    Raises:
        sqlite3.OperationalError: `path` already holds these tables, or cannot be written.
    """
    connection = sqlite3.connect(path)
    connection.executescript(SCHEMA)
    for table, rows in _tables(random.Random(seed)).items():
        marks = ",".join("?" * len(rows[0]))
        connection.executemany(f"INSERT INTO {table} VALUES ({marks})", rows)
    connection.commit()
    return connection


def _tables(rng: random.Random) -> dict[str, list[Row]]:
    people = [f"{first} {last}" for first in FIRST_NAMES for last in LAST_NAMES]
    names = rng.sample(people, NUM_CUSTOMERS + NUM_EMPLOYEES)
    products = _products(rng)
    orders = _orders(rng)
    return {
        "customers": _customers(rng, names[:NUM_CUSTOMERS]),
        "employees": _employees(rng, names[NUM_CUSTOMERS:]),
        "products": products,
        "orders": orders,
        "order_items": _order_items(rng, orders, products),
        "reviews": _reviews(rng),
    }


def _customers(rng: random.Random, names: list[str]) -> list[Row]:
    rows: list[Row] = []
    for customer_id, name in enumerate(names, 1):
        city = rng.choice(CITIES)
        year = rng.randint(2015, 2025)
        rows.append((customer_id, name, city, COUNTRY_OF[city], rng.choice(SEGMENTS), year))
    return rows


def _employees(rng: random.Random, names: list[str]) -> list[Row]:
    return [
        (
            employee_id,
            name,
            rng.choice(DEPARTMENTS),
            rng.randint(28, 120) * 1000,
            rng.randint(2010, 2025),
        )
        for employee_id, name in enumerate(names, 1)
    ]


def _products(rng: random.Random) -> list[Row]:
    every = [
        (f"{adjective} {noun}", category)
        for category, nouns in NOUNS.items()
        for noun in nouns
        for adjective in ADJECTIVES
    ]
    return [
        (product_id, name, category, round(rng.uniform(5, 400), 2), rng.randint(0, 300))
        for product_id, (name, category) in enumerate(rng.sample(every, NUM_PRODUCTS), 1)
    ]


def _orders(rng: random.Random) -> list[Row]:
    return [
        (
            order_id,
            rng.randint(1, NUM_CUSTOMERS - NUM_WITHOUT_SALES),
            rng.randint(1, NUM_EMPLOYEES),
            rng.randint(2018, 2025),
            rng.choice(STATUSES),
            rng.choice(CHANNELS),
        )
        for order_id in range(1, NUM_ORDERS + 1)
    ]


def _order_items(rng: random.Random, orders: list[Row], products: list[Row]) -> list[Row]:
    rows: list[Row] = []
    for order in orders:
        for product in rng.sample(products[: NUM_PRODUCTS - NUM_WITHOUT_SALES], rng.randint(1, 4)):
            unit_price = round(product[3] * rng.uniform(0.8, 1.0), 2)
            rows.append((len(rows) + 1, order[0], product[0], rng.randint(1, 9), unit_price))
    return rows


def _reviews(rng: random.Random) -> list[Row]:
    return [
        (
            review_id,
            rng.randint(1, NUM_PRODUCTS),
            rng.randint(1, NUM_CUSTOMERS),
            rng.choice((1, 2, 3, 3, 4, 4, 4, 5, 5)),
            rng.randint(2018, 2025),
        )
        for review_id in range(1, NUM_REVIEWS + 1)
    ]
