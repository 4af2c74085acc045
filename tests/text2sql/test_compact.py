from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_workflow.text2sql.compact import (
    FIXED_TESTS,
    USES_EVERY_NUMBER,
    USES_EVERY_VALUE,
    USES_NOTHING_ELSE,
    CompactPrompts,
    clauses,
    hints,
)
from vllm_workflow.text2sql.shop.roles import Shop
from vllm_workflow.text2sql.types import Execution, Schema, SqlCandidate, Status, Task, ValueHit

PARIS = ValueHit(table="customers", column="city", value="Paris")
RETURNED = ValueHit(table="orders", column="status", value="returned")
BOOKS = ValueHit(table="products", column="category", value="books")
COUNT = "SELECT COUNT(*) FROM customers WHERE customers.city = 'Paris'"

prompts = CompactPrompts()
shop = Shop()


def task(question: str = "How many customers are there in Paris?", *hits: ValueHit) -> Task:
    return Task(question=question, schema=Schema(tables=()), hits=hits)


def candidate(sql: str = COUNT) -> SqlCandidate:
    return SqlCandidate(sql=sql, execution=shop.execute(sql))


def check(test: str, sql: str = COUNT) -> bool | None:
    return prompts.check(task(), test, candidate(sql), shop)


def test_a_prompt_is_one_short_user_turn_with_question_and_hint() -> None:
    messages = prompts.generate(task("How many customers are in Paris?", PARIS), 0)

    assert messages == [
        {
            "role": "user",
            "content": "SQL: How many customers are in Paris?\nHint: customers.city = 'Paris'",
        }
    ]


def test_the_two_templates_differ() -> None:
    assert prompts.generate(task(), 0) != prompts.generate(task(), 1)


def test_schema_selection_is_skipped() -> None:
    schema = Schema(tables=())

    assert prompts.select_schema(task()) is None
    assert prompts.parse_select_schema("anything", schema) is schema


def test_hints_follow_the_question_and_leave_out_what_it_does_not_say() -> None:
    rome = ValueHit(table="customers", column="city", value="Rome")

    assert (
        hints("Who in PARIS bought books?", (BOOKS, rome, PARIS))
        == "customers.city = 'Paris'; products.category = 'books'"
    )


def test_a_value_inside_a_longer_word_is_not_a_hint() -> None:
    assert hints("Who bought notebooks in Paris?", (BOOKS, PARIS)) == "customers.city = 'Paris'"


def test_a_resemblance_is_a_hint_only_for_a_name_without_anything_better() -> None:
    assert hints("Who lives in Pariss?", (PARIS, BOOKS)) == "customers.city = 'Paris'"
    assert hints("Return all customers.", (RETURNED,)) == "none"
    assert hints("Who lives here?", ()) == "none"


def test_a_revision_shows_the_message_of_sqlite() -> None:
    failed = candidate("SELECT customers.town FROM customers")

    content = prompts.revise(task(), failed)[0]["content"]

    assert "Query: SELECT customers.town FROM customers" in content
    assert content.endswith("Result: no such column: customers.town")


def test_a_revision_of_an_empty_result_says_so() -> None:
    empty = candidate("SELECT customers.name FROM customers WHERE customers.city = 'paris'")

    assert prompts.revise(task(), empty)[0]["content"].endswith("Result: no rows")


@pytest.mark.parametrize(
    ("text", "sql"),
    [
        ("SELECT 1", "SELECT 1"),
        ("-- tables: orders\nSELECT COUNT(*)\nFROM orders;", "SELECT COUNT(*) FROM orders"),
        ("Here it is:\n```sql\nSELECT 1;\n```\nDone.", "SELECT 1"),
        ("I do not know.", ""),
        ("", ""),
    ],
)
def test_the_sql_of_an_answer_is_found(text: str, sql: str) -> None:
    assert prompts.parse_sql(text) == sql


def test_keywords_are_read_from_a_json_list() -> None:
    assert prompts.parse_keywords('["Paris", "customers", "Paris", 3]') == ["Paris", "customers"]
    assert prompts.parse_keywords("none at all") == []


def test_unit_tests_are_lines_without_numbers_and_repetitions() -> None:
    text = "1. selects COUNT(*)\n- returns 1 columns\n\nselects COUNT(*)"

    assert prompts.parse_unit_tests(text) == [
        *FIXED_TESTS,
        "selects COUNT(*)",
        "returns 1 columns",
    ]


def test_a_query_states_all_its_clauses() -> None:
    sql = (
        "SELECT DISTINCT customers.city, COUNT(*) FROM orders JOIN customers ON "
        "orders.customer_id = customers.customer_id WHERE orders.status <> 'shipped' AND "
        "orders.order_year BETWEEN 2019 AND 2021 GROUP BY customers.city HAVING COUNT(*) > 3 "
        "ORDER BY COUNT(*) DESC, customers.city LIMIT 5"
    )

    assert clauses(sql) == (
        "selects customers.city, COUNT(*)",
        "reads customers, orders",
        "filters orders.status <> 'shipped'",
        "filters orders.order_year BETWEEN 2019 AND 2021",
        "has 2 filters",
        "groups by customers.city",
        "keeps groups COUNT(*) > 3",
        "orders by COUNT(*) DESC, customers.city",
        "returns 5 rows",
        "returns 2 columns",
        "removes duplicates",
    )


@pytest.mark.parametrize(
    ("test", "verdict"),
    [
        ("filters customers.city = 'Paris'", True),
        ("filters  customers.city = 'Paris'.", True),
        ("filters customers.city = 'Rome'", False),
        ("has 1 filters", True),
        ("groups by customers.city", False),
        ("does not group", True),
        ("returns 1 columns", True),
        ("returns all rows", True),
        (f"same result as: {COUNT}", True),
        ("same result as: SELECT COUNT(*) FROM customers", False),
        ("same result as: SELECT nothing", None),
        ("the answer should be a positive number", None),
    ],
)
def test_a_test_is_decided_by_parsing_or_executing(test: str, verdict: bool | None) -> None:
    assert check(test) is verdict


@pytest.mark.parametrize(
    ("where", "failed"),
    [
        ("products.price > 120 AND products.category = 'books'", []),
        ("products.price > 120", [USES_EVERY_VALUE]),
        ("products.category = 'books'", [USES_EVERY_NUMBER]),
        (
            "products.stock > 120 AND products.category = 'toys'",
            [USES_EVERY_VALUE, USES_NOTHING_ELSE],
        ),
        (
            "products.price > 12 AND products.category = 'books'",
            [USES_EVERY_NUMBER, USES_NOTHING_ELSE],
        ),
    ],
)
def test_the_fixed_tests_compare_the_numbers_and_values_of_question_and_query(
    where: str, failed: list[str]
) -> None:
    asked = task("Which three books cost more than 120?", BOOKS)
    query = candidate(f"SELECT products.name FROM products WHERE {where} LIMIT 3")

    verdicts = {test: prompts.check(asked, test, query, shop) for test in FIXED_TESTS}

    assert [test for test, passed in verdicts.items() if not passed] == failed


def test_a_written_test_about_a_number_that_was_not_asked_for_is_passed_by_nobody() -> None:
    wrong = "SELECT products.name FROM products WHERE products.price > 260"

    verdict = prompts.check(
        task("What costs more than 120?"), "filters products.price > 260", candidate(wrong), shop
    )

    assert verdict is False


def test_a_query_that_cannot_be_parsed_passes_no_statement() -> None:
    assert check("does not group", "SELECT FROM WHERE (") is False


def test_a_verdict_is_read_per_candidate_and_unreadable_ones_fail() -> None:
    text = "1: pass\n2: fail\nthree: pass\n4: passed\n9: pass\n99999999999: pass"

    assert prompts.parse_evaluate(text, 4) == [True, False, False, True]


@given(text=st.text(), count=st.integers(0, 5))
def test_parsing_never_raises(text: str, count: int) -> None:
    prompts.parse_keywords(text)
    prompts.parse_sql(text)
    prompts.parse_unit_tests(text)
    clauses(text)

    assert len(prompts.parse_evaluate(text, count)) == count


@given(text=st.text())
def test_checking_never_raises(text: str) -> None:
    execution = Execution(sql=text, status=Status.ERROR, message=text)

    verdict = prompts.check(task(), text, SqlCandidate(sql=text, execution=execution), shop)

    assert verdict in (True, False, None)


@given(question=st.text(), value=st.text(min_size=1))
def test_hints_can_be_made_of_any_text(question: str, value: str) -> None:
    assert hints(question, (ValueHit(table="t", column="c", value=value),))
