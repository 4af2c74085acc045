"""Draws wordings and conditions at random: what the intents of the shop grammar are made of."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from vllm_workflow.text2sql.shop import database as shop
from vllm_workflow.text2sql.shop.question_forms import QUESTIONS
from vllm_workflow.text2sql.shop.wordings import COMPARISONS, CONDITIONS, WORDS

PHRASES: dict[str, tuple[str, ...]] = {**WORDS, **CONDITIONS, **COMPARISONS, **QUESTIONS}
"""Every list of wordings by its name."""

RESERVE_FROM = 3
"""Of a list of wordings with at least this many entries the last is reserved."""
RESERVED_SHARE = 0.3
"""How often the split `wording` takes the reserved entry where there is one."""
SYLLABLES = (
    "ba", "ke", "lo", "mi", "nu", "ra", "so", "ti", "va", "zu", "dor", "len", "mar", "pin", "ster",
    "ville", "burg", "ton", "fel", "gra",
)  # fmt: skip

NUMBER_WORDS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
)  # fmt: skip


class Split(StrEnum):
    """Which wordings the grammar may draw."""

    TRAIN = "train"
    """Never a reserved wording."""
    WORDING = "wording"
    """At least one reserved wording in every question."""
    ALL = "all"


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """A column that conditions may restrict, with the operators and values they use."""

    column: str
    """Qualified: `table.column`."""
    operators: tuple[str, ...]
    values: Sequence[str] | range


YEARS = range(2018, 2026)
FIELDS: dict[str, tuple[Field, ...]] = {
    "customers": (
        Field(column="customers.city", operators=("=",), values=shop.CITIES),
        Field(column="customers.country", operators=("=",), values=shop.COUNTRIES),
        Field(column="customers.segment", operators=("=", "=", "=", "<>"), values=shop.SEGMENTS),
        Field(column="customers.signup_year", operators=("=", ">", "<"), values=range(2015, 2026)),
    ),
    "products": (
        Field(
            column="products.category", operators=("=", "=", "=", "=", "<>"), values=shop.CATEGORIES
        ),
        Field(column="products.price", operators=(">", "<", "BETWEEN"), values=range(10, 400, 10)),
        Field(column="products.stock", operators=(">", "<"), values=range(10, 300, 10)),
    ),
    "employees": (
        Field(column="employees.department", operators=("=",), values=shop.DEPARTMENTS),
        Field(column="employees.salary", operators=(">", "<"), values=range(30000, 120000, 1000)),
        Field(column="employees.hire_year", operators=("=", ">", "<"), values=range(2010, 2026)),
    ),
    "orders": (
        Field(column="orders.status", operators=("=", "=", "=", "<>"), values=shop.STATUSES),
        Field(column="orders.channel", operators=("=",), values=shop.CHANNELS),
        Field(column="orders.order_year", operators=("=", ">", "<"), values=YEARS),
    ),
    "reviews": (
        Field(column="reviews.rating", operators=("=", ">", "<"), values=range(1, 6)),
        Field(column="reviews.review_year", operators=("=",), values=YEARS),
    ),
}

MARK = "\0"
"""Follows a reserved wording until the question is complete: what is drawn is not always used."""
_REQUESTS = tuple(word for word in PHRASES["show"] if not word.startswith("I "))
_BRACKET = re.compile(r"\[([^\[\]]*)\]")
_SLOT = re.compile(r"\{(\w+)\}")
_SINGULAR = (
    (re.compile(r"\bhave\b"), "has"),
    (re.compile(r"\b(are|Are)\b"), "is"),
    (re.compile(r"\bthe names of\b"), "the name of"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """Conditions as they are said after a noun, and as SQL."""

    said: str
    """Empty, or with a leading space."""
    sql: tuple[str, ...]


class Phrasing:
    """Draws wordings and values; the same seed draws the same."""

    def __init__(self, seed: int, split: Split = Split.TRAIN, *, invented: float = 0.0) -> None:
        """Start the draw.

        Args:
            seed: Seed of everything drawn.
            split: Which wordings may be used.
            invented: Share of the text values, 0 to 1, that are made up instead of taken from
                the database, so that a model learns to copy values it has never seen.
        """
        self.rng = random.Random(seed)
        self.split = split
        self.invented = invented

    def pick(self, wordings: Sequence[str]) -> str:
        """Draw one entry of a list of wordings, as the split allows."""
        if len(wordings) < RESERVE_FROM or self.split is Split.ALL:
            return self.rng.choice(wordings)
        if self.split is Split.WORDING and self.rng.random() < RESERVED_SHARE:
            return wordings[-1] + MARK
        return self.rng.choice(wordings[:-1])

    def say(self, name: str, **slots: str) -> str:
        """Draw a wording of the list `name` and fill its slots."""
        return self._fill(self.pick(PHRASES[name]), slots)

    def ask(self, name: str, k: int = 0, **slots: str) -> str:
        """Draw a question; with `k` == 1 and a slot `one`, in the singular without a number."""
        if k != 1:
            in_words = k < len(NUMBER_WORDS) and self.rng.random() < 0.2
            return self.say(name, k=NUMBER_WORDS[k] if in_words else str(k), **slots)
        text = self.say(name, k="", **{**slots, "e": slots["one"]})
        for plural, singular in _SINGULAR:
            text = plural.sub(singular, text)
        return text

    def text_value(self, values: Sequence[str]) -> str:
        """Draw one of the values, or invent one that is written like them."""
        value = self.rng.choice(values)
        if self.rng.random() >= self.invented:
            return value
        words = ["".join(self.rng.choices(SYLLABLES, k=self.rng.randint(2, 3)))]
        if " " in value:
            words.append("".join(self.rng.choices(SYLLABLES, k=2)))
        return " ".join(w.capitalize() if value[0].isupper() else w for w in words)

    def condition(self, field: Field) -> tuple[str, str]:
        """Draw a condition on `field`: as it is said and as it is written in SQL."""
        operator = self.rng.choice(field.operators)
        phrase = f"{field.column} {operator}"
        if not isinstance(field.values, range):
            value = self.text_value(field.values)
            return self.say(phrase, v=value), f"{phrase} '{value}'"
        if operator == "BETWEEN":
            low, high = sorted(self.rng.sample(field.values, 2))
            return self.say(phrase, v=str(low), w=str(high)), f"{phrase} {low} AND {high}"
        number = str(self.rng.choice(field.values))
        return self.say(phrase, v=number), f"{phrase} {number}"

    def conditions(self, table: str, counts: Sequence[int] = (0, 1, 1, 1, 2)) -> Conditions:
        """Draw conditions on different columns of `table`, as many as one entry of `counts`."""
        fields = self.rng.sample(FIELDS[table], self.rng.choice(counts))
        said, sql = "", []
        for field in fields:
            phrase, clause = self.condition(field)
            said += f"{self.say('and') if said else ''} {phrase}"
            sql.append(clause)
        return Conditions(said=said, sql=tuple(sql))

    def _fill(self, text: str, slots: dict[str, str]) -> str:
        while bracket := _BRACKET.search(text):
            chosen = self.pick(bracket.group(1).split("|"))
            text = text[: bracket.start()] + chosen + text[bracket.end() :]
        return _SLOT.sub(lambda slot: self._slot(slot.group(1), slots), text)

    def _slot(self, name: str, slots: dict[str, str]) -> str:
        return slots[name] if name in slots else self._fill(self.pick(PHRASES[name]), slots)

    def opened(self, question: str) -> str:
        """Put words of courtesy before some of the requests."""
        if not question.startswith(_REQUESTS) or self.rng.random() > 0.12:
            return question
        return self.say("opener", q=question[0].lower() + question[1:])
