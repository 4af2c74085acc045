"""Controlled English about the shop: questions with their gold SQL, drawn at random from a seed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from vllm_workflow.text2sql.shop.intents import INTENTS
from vllm_workflow.text2sql.shop.phrasing import MARK, Phrasing, Split


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A question and the SQL that answers it."""

    intent: str
    question: str
    sql: str
    num_reserved: int = 0
    """How many reserved wordings the question uses."""


class Grammar:
    """Draws questions about the shop; the same seed draws the same questions."""

    def __init__(self, seed: int, split: Split = Split.TRAIN, *, invented: float = 0.0) -> None:
        """Start the draw; the arguments are those of `Phrasing`."""
        self.phrasing = Phrasing(seed, split, invented=invented)

    def sample(self) -> Pair:
        """Draw one question at its natural frequency."""
        phrasing = self.phrasing
        weights = [weight for _, weight in INTENTS.values()]
        while True:
            (intent,) = phrasing.rng.choices(list(INTENTS), weights)
            question, sql = INTENTS[intent][0](phrasing)
            question = phrasing.opened(question)
            num_reserved = question.count(MARK)
            question = re.sub(r" +(?=[ ?.])", "", question.replace(MARK, ""))
            if phrasing.split is not Split.WORDING or num_reserved:
                return Pair(intent=intent, question=question, sql=sql, num_reserved=num_reserved)


def sample_pairs(seed: int, split: Split, *, invented: float = 0.0) -> Iterator[Pair]:
    """Draw pairs without end."""
    grammar = Grammar(seed, split, invented=invented)
    while True:
        yield grammar.sample()
