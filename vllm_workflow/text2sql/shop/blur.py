"""Disturbed questions: a model that met unknown words in training is not lost at the first one."""

from __future__ import annotations

import random
import re
from collections.abc import Collection

LETTERS = "aeiourstlnmdpcgbhkfvwy"
FILLERS = (
    "please", "for me", "in our database", "right now", "in total", "exactly", "at the moment",
    "by any chance", "if possible", "in the shop", "actually", "so far", "thanks",
)  # fmt: skip
OPENINGS = (
    "hello,", "hey,", "I wonder:", "quick question:", "my boss asks:", "tell me,", "we need this:",
    "do you know", "I am curious,", "for my report:",
)  # fmt: skip
DROPPABLE = frozenset(
    [
        "the",
        "a",
        "an",
        "of",
        "are",
        "is",
        "that",
        "who",
        "which",
        "were",
        "there",
        "do",
        "did",
        "we",
        "have",
        "all",
        "any",
        "and",
        "our",
        "with",
    ]
)
_WORD = re.compile(r"[a-z]{2,}")


def blurred(question: str, kept: Collection[str], rng: random.Random) -> str:
    """Disturb one or two things of a question; words of the values in `kept` stay."""
    for _ in range(rng.randint(1, 2)):
        question = _disturbed(question, kept, rng)
    return question


def _disturbed(question: str, kept: Collection[str], rng: random.Random) -> str:
    protected = {word for value in kept for word in value.split()}
    words = question.split(" ")
    free = [i for i, word in enumerate(words) if _WORD.fullmatch(word) and word not in protected]
    chance = rng.random()
    if chance < 0.35 and free:
        words[rng.choice(free)] = "".join(rng.choices(LETTERS, k=rng.randint(3, 9)))
    elif chance < 0.55 and free:
        droppable = [i for i in free if words[i] in DROPPABLE]
        if droppable:
            del words[rng.choice(droppable)]
    elif chance < 0.65 and free:
        words.insert(rng.choice(free), rng.choice(FILLERS))
    elif chance < 0.75:
        return f"{rng.choice(OPENINGS)} {question[0].lower()}{question[1:]}"
    elif chance < 0.85:
        stem = question.rstrip("?.")
        return f"{stem}, {rng.choice(FILLERS)}{question[len(stem) :]}"
    elif chance < 0.93:
        return question.rstrip("?.")
    else:
        return question[0].lower() + question[1:]
    return " ".join(words)
