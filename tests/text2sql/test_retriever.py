"""Value retrieval: what a question mentions is found in the database."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.text2sql.builders import make_database
from vllm_workflow.text2sql.database import Database
from vllm_workflow.text2sql.retriever import ValueRetriever
from vllm_workflow.text2sql.types import ValueHit

NEW_YORK = ValueHit(table="city", column="name", value="New York")
YORK = ValueHit(table="city", column="name", value="York")
BERLIN = ValueHit(table="city", column="name", value="Berlin")
BETTYS = ValueHit(table="shop", column="name", value="Betty's")


@pytest.fixture(scope="module")
def retriever(tmp_path_factory: pytest.TempPathFactory) -> ValueRetriever:
    path = make_database(tmp_path_factory.mktemp("db") / "shops.sqlite")
    return ValueRetriever(Database(path))


def test_a_keyword_is_found_as_it_is_written(retriever: ValueRetriever) -> None:
    assert retriever.retrieve(["Berlin"], "") == (BERLIN,)


def test_a_keyword_is_found_in_other_case(retriever: ValueRetriever) -> None:
    assert retriever.retrieve(["bERLIN"], "") == (BERLIN,)


def test_a_misspelt_keyword_is_found_by_similarity(retriever: ValueRetriever) -> None:
    assert retriever.retrieve(["Berlinn"], "") == (BERLIN,)


def test_an_unlike_keyword_is_not_found(retriever: ValueRetriever) -> None:
    assert retriever.retrieve(["Madrid"], "") == ()


def test_values_of_several_words_are_found_in_the_question(retriever: ValueRetriever) -> None:
    assert retriever.retrieve([], "How many shops are in new york?") == (NEW_YORK,)


def test_a_value_inside_a_longer_one_is_not_found_twice(retriever: ValueRetriever) -> None:
    assert YORK not in retriever.retrieve([], "Shops in New York?")
    assert YORK in retriever.retrieve([], "Shops in New York and in York?")


def test_punctuation_around_and_inside_a_value_does_no_harm(retriever: ValueRetriever) -> None:
    assert retriever.retrieve([], 'Where is "Betty\'s"?') == (BETTYS,)
    assert retriever.retrieve(["'Berlin'"], "") == (BERLIN,)


def test_without_keywords_the_question_is_searched_by_similarity(
    retriever: ValueRetriever,
) -> None:
    assert retriever.retrieve([], "shops in Berlim") == (BERLIN,)


def test_exact_hits_come_before_similar_ones(retriever: ValueRetriever) -> None:
    assert retriever.retrieve(["Berlinn", "York"], "") == (YORK, BERLIN)


def test_hits_are_capped(retriever: ValueRetriever) -> None:
    capped = ValueRetriever(retriever.database, max_hits=1)
    assert len(capped.retrieve(["York", "Berlin"], "")) == 1


def test_a_column_beyond_the_cap_is_asked_for_equal_values(tmp_path: Path) -> None:
    script = """CREATE TABLE t (a TEXT);
                WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n WHERE x < 2000)
                INSERT INTO t SELECT 'value ' || x FROM n;"""
    database = Database(make_database(tmp_path / "big.sqlite", script))
    retriever = ValueRetriever(database, max_values_per_column=10)

    hits = retriever.retrieve([], "Which rows have VALUE 1999?")

    assert ValueHit(table="t", column="a", value="value 1999") in hits


@given(st.lists(st.text(max_size=20), max_size=5), st.text(max_size=60))
@settings(max_examples=60, deadline=None)
def test_any_keywords_and_any_question_give_values_of_the_database(
    retriever: ValueRetriever, keywords: list[str], question: str
) -> None:
    for hit in retriever.retrieve(keywords, question):
        assert hit in retriever.retrieve([hit.value], "")
