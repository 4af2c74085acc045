from __future__ import annotations

import json
import random
import subprocess
import sys
from itertools import islice, pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_workflow.text2sql.compact import CompactPrompts, clauses
from vllm_workflow.text2sql.shop.blur import blurred
from vllm_workflow.text2sql.shop.corruption import FAILING, MISLEADING, corrupted
from vllm_workflow.text2sql.shop.grammar import sample_pairs
from vllm_workflow.text2sql.shop.phrasing import Split
from vllm_workflow.text2sql.shop.roles import (
    MIX,
    Example,
    ExampleStream,
    Shop,
    plan_of,
    telling_tests,
    verdicts,
)
from vllm_workflow.text2sql.types import SqlCandidate, Stage, Status

ROOT = Path(__file__).parents[2]

prompts = CompactPrompts()
shop = Shop()


def examples(stage: Stage, count: int = 40) -> list[Example]:
    drawn = (example for example in ExampleStream(0) if example.stage is stage)
    return list(islice(drawn, count))


def test_every_stage_is_trained_at_its_share() -> None:
    drawn = list(islice(ExampleStream(0), 1000))

    for stage, percent in MIX.items():
        share = sum(example.stage is stage for example in drawn) / len(drawn)
        assert share == pytest.approx(percent / sum(MIX.values()), abs=0.05)


def test_the_same_seed_gives_the_same_examples() -> None:
    assert list(islice(ExampleStream(5), 50)) == list(islice(ExampleStream(5), 50))


def test_held_out_questions_never_occur() -> None:
    held_out = {example.pair.question for example in islice(ExampleStream(0), 200)}

    stream = ExampleStream(0, held_out=held_out)

    assert all(example.pair.question not in held_out for example in islice(stream, 400))


def test_training_examples_use_no_reserved_wording() -> None:
    assert {example.pair.num_reserved for example in islice(ExampleStream(0), 300)} == {0}


@pytest.mark.parametrize("stage", [Stage.GENERATE, Stage.REVISE])
def test_the_answer_of_a_sql_stage_parses_to_the_gold_sql(stage: Stage) -> None:
    for example in examples(stage):
        assert prompts.parse_sql(example.answer) == example.pair.sql


def test_a_query_to_revise_really_failed_with_the_message_shown() -> None:
    for example in examples(Stage.REVISE, 100):
        *_, query, result = example.messages[0]["content"].split("\n")
        execution = shop.execute(query.removeprefix("Query: "))

        assert execution.status in (Status.ERROR, Status.EMPTY)
        assert result == f"Result: {' '.join(execution.message.split())[:160] or 'no rows'}"


def test_unit_tests_hold_for_the_gold_sql_and_not_for_every_candidate() -> None:
    for example in examples(Stage.UNIT_TESTS):
        tests = example.answer.splitlines()
        candidates = [
            line.split(": ", 1)[1]
            for line in example.messages[0]["content"].split("\n")
            if line[:1].isdigit()
        ]

        assert tests
        for test in tests:
            assert test in clauses(example.pair.sql)
            assert any(test not in clauses(sql) for sql in candidates)


def test_the_most_telling_test_comes_first() -> None:
    gold = "SELECT COUNT(*) FROM orders WHERE orders.status = 'shipped'"
    wrong = ["SELECT COUNT(*) FROM orders", "SELECT orders.status FROM orders"]

    assert telling_tests(gold, wrong)[:2] == ["filters orders.status = 'shipped'", "has 1 filters"]


def test_verdicts_are_read_back_as_the_parser_gave_them() -> None:
    found = [SqlCandidate(sql=sql, execution=shop.execute(sql)) for sql in ("SELECT 1", "SELECT 2")]

    assert prompts.parse_evaluate(verdicts("selects 2", found), 2) == [False, True]


def test_keywords_are_json() -> None:
    for example in examples(Stage.KEYWORDS):
        assert prompts.parse_keywords(example.answer) == list(
            dict.fromkeys(json.loads(example.answer))
        )


def test_a_plan_names_the_tables_in_the_order_of_the_joins() -> None:
    sql = "SELECT 1 FROM orders JOIN customers ON orders.customer_id = customers.customer_id"

    assert plan_of(sql) == "-- tables: orders, customers"


@given(seed=st.integers(0, 2**31), mistakes=st.sampled_from([FAILING, MISLEADING]))
@settings(deadline=None, max_examples=150)
def test_a_corrupted_query_is_another_query(seed: int, mistakes: tuple) -> None:  # type: ignore[type-arg]
    pair, other = islice(sample_pairs(seed, Split.TRAIN), 2)

    assert corrupted(pair.sql, other.sql, random.Random(seed), mistakes) != pair.sql


@pytest.mark.parametrize("mistake", [*FAILING, *MISLEADING], ids=lambda mistake: mistake.__name__)
def test_every_mistake_changes_some_queries_and_raises_on_none(mistake: object) -> None:
    rng = random.Random(0)
    pairs = list(islice(sample_pairs(0, Split.TRAIN), 200))
    changed = [
        mistake(pair.sql, other.sql, rng) != pair.sql  # type: ignore[operator]
        for pair, other in pairwise(pairs)
    ]

    assert any(changed)


@given(seed=st.integers(0, 2**31))
@settings(deadline=None, max_examples=100)
def test_blurring_keeps_the_values(seed: int) -> None:
    question = "How many customers of the corporate segment live in Porto?"

    disturbed = blurred(question, {"corporate", "Porto"}, random.Random(seed))

    assert "corporate" in disturbed
    assert "Porto" in disturbed


@pytest.mark.slow
def test_the_loss_falls_in_a_few_steps_of_training(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    command = [sys.executable, str(ROOT / "examples/text2sql/train.py")]
    options = ["--steps", "60", "--hidden", "128", "--layers", "2", "--out", str(tmp_path)]
    subprocess.run(command + options, check=True, cwd=ROOT, env={"PYTHONPATH": "."})

    info = json.loads((tmp_path / "train_info.json").read_text())

    assert info["last_loss"] < 0.9 * info["first_loss"]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        path.name for path in tmp_path.iterdir()
    }


def test_the_shipped_model_is_complete_and_small() -> None:
    files = {
        path.name: path.stat().st_size for path in (ROOT / "examples/text2sql/model").iterdir()
    }

    assert {
        "README.md",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "train_info.json",
    } <= files.keys()
    assert sum(files.values()) < 15_000_000


def test_the_shipped_model_is_what_training_makes_by_default() -> None:
    info = json.loads((ROOT / "examples/text2sql/model/train_info.json").read_text())
    source = (ROOT / "examples/text2sql/train.py").read_text()

    assert f"default={info['steps']}," in source
