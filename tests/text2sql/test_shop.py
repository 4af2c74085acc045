from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_workflow.text2sql.shop.database import build
from vllm_workflow.text2sql.shop.grammar import Pair, sample_pairs
from vllm_workflow.text2sql.shop.intents import INTENTS
from vllm_workflow.text2sql.shop.phrasing import PHRASES, RESERVE_FROM, Phrasing, Split

EXAMPLES = Path(__file__).parents[2] / "examples" / "text2sql"


def drawn(count: int, *, seed: int = 0, split: Split = Split.TRAIN) -> list[Pair]:
    return list(islice(sample_pairs(seed, split), count))


def entries(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (EXAMPLES / name).read_text().splitlines()]


@pytest.fixture(scope="module")
def shop() -> sqlite3.Connection:
    return build()


def test_the_same_seed_builds_the_same_database() -> None:
    assert list(build(seed=3).iterdump()) == list(build(seed=3).iterdump())
    assert list(build(seed=3).iterdump()) != list(build(seed=4).iterdump())


def test_the_database_is_written_to_a_file(tmp_path: Path) -> None:
    build(tmp_path / "shop.sqlite").close()

    reopened = sqlite3.connect(tmp_path / "shop.sqlite")
    tables = reopened.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()

    assert tables == (6,)


def test_every_foreign_key_refers_to_a_row(shop: sqlite3.Connection) -> None:
    assert shop.execute("PRAGMA foreign_key_check").fetchall() == []


@given(seed=st.integers(0, 2**31), split=st.sampled_from(list(Split)))
@settings(deadline=None, max_examples=100)
def test_all_gold_sql_executes(shop: sqlite3.Connection, seed: int, split: Split) -> None:
    for pair in drawn(10, seed=seed, split=split):
        shop.execute(pair.sql).fetchmany(1)


@given(seed=st.integers(0, 2**31))
@settings(deadline=None, max_examples=30)
def test_a_question_is_a_function_of_the_seed(seed: int) -> None:
    assert drawn(3, seed=seed) == drawn(3, seed=seed)


@pytest.mark.parametrize("intent", INTENTS)
def test_a_question_has_no_slots_left(intent: str) -> None:
    for seed in range(40):
        question, sql = INTENTS[intent][0](Phrasing(seed, Split.ALL))

        assert not set("{}[]|") & set(question + sql)


def test_most_gold_answers_are_not_empty(shop: sqlite3.Connection) -> None:
    answered = sum(bool(shop.execute(pair.sql).fetchone()) for pair in drawn(400))

    assert answered > 350


def test_thousands_of_questions_are_distinct() -> None:
    assert len({pair.question for pair in drawn(3000)}) > 2700


def test_training_draws_no_reserved_wording_and_the_wording_split_always_does() -> None:
    assert {pair.num_reserved for pair in drawn(500)} == {0}
    assert min(pair.num_reserved for pair in drawn(500, split=Split.WORDING)) == 1


def test_every_wording_that_training_may_draw_is_drawn_and_no_other() -> None:
    phrasing = Phrasing(0, Split.TRAIN)
    for wordings in PHRASES.values():
        allowed = set(wordings[:-1] if len(wordings) >= RESERVE_FROM else wordings)

        assert {phrasing.pick(wordings) for _ in range(300)} == allowed
        assert len(wordings) < RESERVE_FROM or wordings[-1] not in allowed


def test_the_splits_train_and_wording_share_no_question() -> None:
    seen_in_training = {pair.question for pair in drawn(4000)}
    held_out = {pair.question for pair in drawn(1000, split=Split.WORDING)}

    assert not seen_in_training & held_out


@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("questions.jsonl", 200),
        ("questions_wording.jsonl", 150),
        ("questions_handwritten.jsonl", 40),
    ],
)
def test_every_shipped_question_has_a_non_empty_answer(
    name: str, least: int, shop: sqlite3.Connection
) -> None:
    shipped = entries(name)

    assert len(shipped) >= least
    assert len({entry["id"] for entry in shipped}) == len(shipped)
    assert len({entry["question"] for entry in shipped}) == len(shipped)
    for entry in shipped:
        assert any(cell not in (None, 0) for cell in shop.execute(entry["sql"]).fetchone())


def test_the_shipped_question_sets_are_those_of_the_script(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "make_questions.py"), "--out", str(tmp_path)]
    subprocess.run(command, check=True, cwd=EXAMPLES.parents[1], env={"PYTHONPATH": "."})

    for name in ("questions.jsonl", "questions_wording.jsonl"):
        assert (tmp_path / name).read_text() == (EXAMPLES / name).read_text()
