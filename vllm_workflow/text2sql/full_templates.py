"""The fixed texts of `FullPrompts`: one system message per role, the same for every question.

Everything that does not depend on the question stands here, so that a prefix cache computes
it once per server. What follows in the user message goes from the most to the least shared:
schema, then values and evidence, then question, then candidates.
"""

KEYWORDS = """\
You prepare questions about a SQL database for a search in that database.

List the words and phrases of the question that a person would look up: names, places, dates,
numbers with a meaning, categories, and nouns that are probably tables or columns. Take them as
they are written. Keep a phrase together if its words name one thing (`New York`, `credit card`).
Leave out words of ordinary grammar, and do not explain.

Answer with one JSON list of strings and nothing else.

Example
Question: Which suppliers from Porto delivered more than 20 crates of olive oil in May 2021?
Evidence: a crate is a row of `shipment` whose unit is 'C'
Answer: ["suppliers", "Porto", "delivered", "20", "crates", "olive oil", "May 2021", "C"]
"""

SELECT_SCHEMA = """\
You choose the tables and columns of a SQLite database that are needed to answer a question.

You get the schema as CREATE TABLE statements with example values in comments, values that were
found in the database, and the question. Include
- every column whose values are asked for, compared, grouped, sorted or calculated with,
- the columns that join the chosen tables, also through tables in between,
- if two columns could be meant, both.
When in doubt include: a missing column makes the answer impossible, one too many does not.

Answer with one JSON object that maps table names to lists of column names, spelled as in the
schema, and nothing else.

Example answer: {"supplier": ["id", "name", "city"], "shipment": ["supplier_id", "quantity"]}
"""

_SQLITE_RULES = """\
Rules for the SQL
1. Write one SELECT statement in SQLite's dialect. It may start with WITH. Never change data.
2. Use only tables and columns of the schema, spelled as there; put double quotes around names
   with blanks or special characters. Put single quotes around text values, doubling a quote inside.
3. Compare with values as they are stored. The listed values were found in the database: prefer
   them, with their spelling, over the wording of the question.
4. Return exactly the columns that are asked for, in the order of the question, and nothing else:
   no identifiers or helper columns unless they are asked for.
5. Join along foreign keys. Join only tables that are needed. If a join can repeat rows, count
   with COUNT(DISTINCT ...) or select DISTINCT.
6. Division of integers drops the remainder in SQLite: write CAST(x AS REAL) / y for ratios, and
   multiply by 100 for a percentage.
7. For the largest or smallest, ORDER BY ... LIMIT 1; NULL sorts first, so exclude it with
   IS NOT NULL where it can occur.
8. Dates are text: use strftime('%Y', column) or string comparison after looking at the examples.
   There is no YEAR(), no DATEDIFF(), no ILIKE, no FULL JOIN in old versions.
9. Conditions on groups go to HAVING; every selected column that is not an aggregate is grouped by.
10. If evidence is given, take its definitions and formulas literally.
"""

_EXAMPLE_SCHEMA = """\
Example
Schema:
CREATE TABLE shipment (
  id INTEGER PRIMARY KEY, -- 1, 2, 3
  supplier_id INTEGER, -- 4, 9
  goods TEXT, -- 'olive oil', 'rice'
  quantity INTEGER, -- 12, 40
  sent_on TEXT, -- '2021-05-03', '2021-06-17'
  FOREIGN KEY (supplier_id) REFERENCES supplier (id)
);
CREATE TABLE supplier (
  id INTEGER PRIMARY KEY, -- 1, 2, 3
  name TEXT, -- 'Alves', 'Duarte'
  city TEXT -- 'Faro', 'Porto'
);
Values found in the database: supplier.city = 'Porto'; shipment.goods = 'olive oil'
Question: What share of the olive oil of 2021 came from suppliers in Porto, in percent?
"""

_EXAMPLE_SQL = """\
```sql
SELECT CAST(SUM(CASE WHEN s.city = 'Porto' THEN h.quantity ELSE 0 END) AS REAL) * 100
       / SUM(h.quantity)
FROM shipment AS h
JOIN supplier AS s ON s.id = h.supplier_id
WHERE h.goods = 'olive oil' AND strftime('%Y', h.sent_on) = '2021'
```
"""

DIVIDE_AND_CONQUER = (
    """\
You are an expert for SQLite. You answer a question with one SQL query by dividing and conquering.

Work in this order and write it down briefly:
1. Divide. Split the question into sub-questions, each so small that one condition, one join or
   one aggregate answers it. Say for each which tables and columns it needs.
2. Conquer. Write a piece of SQL for every sub-question, smallest first.
3. Combine. Put the pieces together, as joins and conditions where possible, as subqueries or
   WITH otherwise.
4. Simplify. Remove tables, columns and subqueries that the result does not depend on, and compare
   the selected columns with the question once more.

"""
    + _SQLITE_RULES
    + """
Put the final query into a ```sql block at the end of the answer; the last such block counts.

"""
    + _EXAMPLE_SCHEMA
    + """
Answer:
Divide. (a) which shipments are olive oil of 2021: shipment.goods, shipment.sent_on; (b) which of
them come from Porto: supplier.city through shipment.supplier_id; (c) the share of (b) in (a) by
quantity, in percent.
Conquer. (a) WHERE h.goods = 'olive oil' AND strftime('%Y', h.sent_on) = '2021'; (b) JOIN supplier
AS s ON s.id = h.supplier_id with s.city = 'Porto'; (c) sum of quantity over (b), times 100, divided
by the sum over (a), as REAL.
Combine. One pass over (a) is enough: a CASE inside the sum picks (b).
Simplify. Only the share is asked for, so one column.
"""
    + _EXAMPLE_SQL
)

QUERY_PLAN = (
    """\
You are an expert for SQLite. You answer a question with one SQL query by planning its execution.

Think as the database engine does and write the plan down briefly, one line per operation:
1. Which tables are scanned, and by which conditions their rows are filtered.
2. In which order the tables are joined, on which columns, and whether a join can repeat rows.
3. How rows are grouped, and which groups are kept.
4. What is calculated of each row or group.
5. How the result is sorted, cut off and freed of duplicates, and which columns come out.
Then write the query that does exactly this plan.

"""
    + _SQLITE_RULES
    + """
Put the final query into a ```sql block at the end of the answer; the last such block counts.

"""
    + _EXAMPLE_SCHEMA
    + """
Answer:
1. Scan shipment; keep goods = 'olive oil' and year of sent_on = '2021'.
2. Join supplier on supplier.id = shipment.supplier_id; one supplier per shipment, nothing repeats.
3. No grouping: one group over all rows.
4. Sum of quantity where city = 'Porto', as REAL, times 100, divided by the sum of quantity.
5. One row, one column; no order.
"""
    + _EXAMPLE_SQL
)

REVISE = (
    """\
You correct SQL queries for SQLite. You get a schema, a question, a query that was meant to answer
it, and what happened when the query ran: an error message, or a result without rows.

How to find the mistake
- `no such column` or `no such table`: look the name up in the schema; it may belong to another
  table, be spelled differently, or need a join that is missing.
- `ambiguous column name`: put the table's alias before it.
- `syntax error near X`: the mistake is at X or just before it.
- `misuse of aggregate`: move the condition to HAVING or into a subquery.
- stopped after some seconds: a join condition is missing, or a subquery runs once per row.
- refused: only one single SELECT may be executed.
- no rows: a compared value is not stored like that (spelling, case, text instead of number, format
  of a date), a join uses the wrong columns, or two conditions exclude each other. Compare with the
  example values and the values found. If the question truly has no matching rows, repeat the query.
Correct the mistake; keep what is right.

"""
    + _SQLITE_RULES
    + """
Say in one sentence what was wrong, then give the whole corrected query in a ```sql block.
"""
)

UNIT_TESTS = """\
You are a tester of SQL queries. Several candidate queries were written for one question; they give
different results, so at most one of those results is right.

Write unit tests in words that a right query passes and a wrong one fails. Look at where the
candidates differ, decide from question, evidence and schema which way is right, and make a test of
it. A good test
- is one sentence that starts with "The query should",
- names tables, columns, values, order or number of rows concretely,
- can be judged from the query and its result alone,
- tells at least one candidate from another; what all candidates do alike needs no test,
- does not ask for a certain way of writing what can be written in several ways.

Answer with one JSON list of strings, the most telling test first, and nothing else.

Example answer: ["The query should filter on supplier.city = 'Porto' and not on supplier.name", \
"The query should return one row with a percentage between 0 and 100"]
"""

EVALUATE = """\
You judge SQL queries by one unit test. You get a schema, a question, candidate queries with their
results, and the test. Judge each candidate by itself and by this test alone: whether it answers the
question in other respects does not matter here. Two candidates may both pass or both fail.

Answer with one line per candidate and nothing else, in this form:
Candidate 1: [Passed]
Candidate 2: [Failed]
"""
