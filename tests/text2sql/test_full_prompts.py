"""Prompts for instruct models: what is shared comes first, and every answer can be read."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.text2sql.builders import candidate
from vllm_workflow.text2sql.full import FullPrompts, ddl
from vllm_workflow.text2sql.types import (
    Column,
    ForeignKey,
    Message,
    PromptSet,
    Schema,
    Status,
    Table,
    Task,
    ValueHit,
)

CITY = Table(
    name="city",
    columns=(
        Column(name="id", type="INTEGER", primary_key=True, examples=(1, 2)),
        Column(name="name", type="TEXT", examples=("New York", "Sant'Ana")),
        Column(name="size class", type=""),
    ),
)
SHOP = Table(
    name="shop",
    columns=(
        Column(name="id", type="INTEGER", primary_key=True),
        Column(name="city_id", type="INTEGER"),
        Column(name="rating", type="REAL"),
    ),
    foreign_keys=(ForeignKey(column="city_id", ref_table="city", ref_column="id"),),
)
SCHEMA = Schema(tables=(CITY, SHOP))
PROMPTS = FullPrompts()


def task(question: str = "How many shops?", hits: tuple[ValueHit, ...] = ()) -> Task:
    return Task(question=question, schema=SCHEMA, hits=hits)


def all_messages(task: Task) -> list[list[Message]]:
    candidates = [candidate((1,)), candidate((2,))]
    prompts: PromptSet = FullPrompts(min_columns_to_select=0)
    selection = prompts.select_schema(task)
    assert selection is not None
    return [
        prompts.keywords(task.question, task.evidence),
        selection,
        prompts.generate(task, 0),
        prompts.generate(task, 1),
        prompts.revise(task, candidates[0]),
        prompts.unit_tests(task, candidates, 3),
        prompts.evaluate(task, candidates, "The query should count"),
    ]


def test_the_schema_is_written_as_statements_with_examples_in_comments() -> None:
    assert ddl(SCHEMA) == (
        "CREATE TABLE city (\n"
        "  id INTEGER PRIMARY KEY, -- 1, 2\n"
        "  name TEXT, -- 'New York', 'Sant''Ana'\n"
        '  "size class"\n'
        ");\n"
        "CREATE TABLE shop (\n"
        "  id INTEGER PRIMARY KEY,\n"
        "  city_id INTEGER,\n"
        "  rating REAL,\n"
        "  FOREIGN KEY (city_id) REFERENCES city (id)\n"
        ");"
    )


def test_an_example_value_stays_on_its_line() -> None:
    column = Column(name="note", type="TEXT", examples=("a\n); DROP\r\nb", "x" * 500))
    text = ddl(Schema(tables=(Table(name="t", columns=(column,)),)))

    assert len(text.splitlines()) == 3
    assert max(map(len, text.splitlines())) < 150


def test_two_questions_share_template_and_schema_as_prefix() -> None:
    first = all_messages(task("Question one?"))[1:]
    second = all_messages(task("Another one?"))[1:]

    for one, other in zip(first, second, strict=True):
        assert one[0] == other[0]
        assert len(one[0]["content"]) > 400
        head = one[1]["content"].partition("Values found")[0]
        assert ddl(SCHEMA) in head
        assert other[1]["content"].startswith(head)


def test_parallel_judgements_differ_only_at_the_end() -> None:
    candidates = [candidate((1,)), candidate((2,))]
    one, other = (PROMPTS.evaluate(task(), candidates, test)[1]["content"] for test in "ab")

    shared = one.partition("Unit test:")[0]
    assert "Candidate 2" in shared
    assert other.startswith(shared)


def test_the_two_templates_differ() -> None:
    assert PROMPTS.generate(task(), 0)[0] != PROMPTS.generate(task(), 1)[0]


def test_small_schemas_are_not_selected_from() -> None:
    assert FullPrompts(min_columns_to_select=7).select_schema(task()) is None
    assert FullPrompts(min_columns_to_select=6).select_schema(task()) is not None


def test_a_revise_prompt_says_what_happened() -> None:
    failed = candidate(sql="SELECT x", status=Status.ERROR, message="no such column: x")

    text = PROMPTS.revise(task(), failed)[1]["content"]

    assert "SELECT x" in text
    assert "no such column: x" in text
    assert "returned no rows" in PROMPTS.revise(task(), candidate())[1]["content"]


@pytest.mark.parametrize(
    ("text", "sql"),
    [
        ("SELECT 1", "SELECT 1"),
        ("select 1;", "select 1"),
        ("```sql\nSELECT 1;\n```", "SELECT 1"),
        ("```\nSELECT 1\n```", "SELECT 1"),
        ("```SQL\nSELECT 1", "SELECT 1"),
        ("```sqlite\nSELECT 1\n```", "SELECT 1"),
        ("```sql SELECT 1```", "SELECT 1"),
        ("Draft:\n```sql\nSELECT 1\n```\nFinal:\n```sql\nSELECT 2\n```\nDone.", "SELECT 2"),
        ("```sql\nSELECT 1\n```\nIt gives\n```\n| 1 |\n```", "SELECT 1"),
        ("The answer is below.\n\nSELECT a\nFROM t\n\nI hope it helps.", "SELECT a\nFROM t"),
        ("Answer:\nWITH a AS (SELECT 1)\nSELECT * FROM a", "WITH a AS (SELECT 1)\nSELECT * FROM a"),
        ("<think>```sql\nSELECT 9\n```</think>SELECT 1", "SELECT 1"),
        ("```sql\n-- counts\nSELECT 1\n```", "-- counts\nSELECT 1"),
        ("```sql\nSELECT FORM x\n```", "SELECT FORM x"),
        ("```sql\nDROP TABLE t\n```", ""),
        ("I do not know.", ""),
        ("With pleasure! Select what you like.", ""),
        ("", ""),
    ],
)
def test_sql_is_found_in_an_answer(text: str, sql: str) -> None:
    assert PROMPTS.parse_sql(text) == sql


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('["a", "b c"]', ["a", "b c"]),
        ('Sure:\n```json\n["a", "a", " b "]\n```', ["a", "b"]),
        ("- a\n2. b\n3) c", ["a", "b", "c"]),
        ('["a", 1, null]', ["a"]),
        ("nothing", []),
        ("[" * 5000, []),
    ],
)
def test_lists_are_read_as_json_or_line_by_line(text: str, words: list[str]) -> None:
    assert PROMPTS.parse_keywords(text) == words
    assert PROMPTS.parse_unit_tests(text) == words


def test_a_selection_keeps_keys_and_links() -> None:
    chosen = PROMPTS.parse_select_schema('{"SHOP": ["Rating"], "city": ["name"]}', SCHEMA)

    assert [[column.name for column in table.columns] for table in chosen.tables] == [
        ["id", "name"],
        ["id", "city_id", "rating"],
    ]
    assert chosen.tables[1].foreign_keys == SHOP.foreign_keys


def test_a_selection_drops_links_to_tables_that_are_gone() -> None:
    (shop,) = PROMPTS.parse_select_schema('{"shop": ["rating"]}', SCHEMA).tables

    assert [column.name for column in shop.columns] == ["id", "rating"]
    assert shop.foreign_keys == ()


@pytest.mark.parametrize("text", ["", "no", "{}", "[]", '{"x": ["y"]}', '{"city": 1}', "{" * 9999])
def test_an_unusable_selection_keeps_the_whole_schema(text: str) -> None:
    assert PROMPTS.parse_select_schema(text, SCHEMA) is SCHEMA


@pytest.mark.parametrize(
    ("text", "verdicts"),
    [
        ("Candidate 1: [Passed]\nCandidate 2: [Failed]", [True, False]),
        ("candidate 2 - passed", [False, True]),
        ("**Candidate 1**: it filters well. **[Passed]**\n2. [Passed]", [True, True]),
        ("Candidate 1: [Passed]\nOn reflection, candidate 1: [Failed]", [False, False]),
        ("Candidate 3: [Passed]\nCandidate 0: [Passed]", [False, False]),
        ("<think>Candidate 1: [Passed]</think>Candidate 1: [Failed]", [False, False]),
        ("", [False, False]),
    ],
)
def test_verdicts_are_read_per_candidate(text: str, verdicts: list[bool]) -> None:
    assert PROMPTS.parse_evaluate(text, 2) == verdicts


MARKS = ["```", "(", "[", "{", '"', "'", "]", "}", "/*", "--", ";", "`", "\n", "\n\n", " "]
WORDS = ["sql", "SELECT", "WITH", "1", "Candidate", "passed", "</think>", "\x00", "\ud800", "²"]
PIECES = st.sampled_from([*MARKS, *WORDS])
ANSWERS = st.one_of(
    st.text(),
    st.lists(PIECES, max_size=25).map("".join),
    st.recursive(st.none() | st.text(), lambda inner: st.lists(inner)).map(json.dumps),
    st.sampled_from(["(", "NOT ", "[", "{", "CASE ", "-"]).map(
        lambda part: f"SELECT {part * 3000}"
    ),
)


@given(ANSWERS)
def test_no_answer_makes_parsing_raise(text: str) -> None:
    assert isinstance(PROMPTS.parse_sql(text), str)
    assert all(isinstance(word, str) and word for word in PROMPTS.parse_keywords(text))
    assert all(isinstance(test, str) and test for test in PROMPTS.parse_unit_tests(text))
    assert PROMPTS.parse_select_schema(text, SCHEMA).tables
    assert len(PROMPTS.parse_evaluate(text, 3)) == 3
