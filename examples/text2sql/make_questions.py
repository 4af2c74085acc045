"""Write the held-out question sets of the shop: the same files for the same seed.

`questions.jsonl` holds questions of the grammar that training never sees; their wordings it does
see. `questions_wording.jsonl` holds questions that use at least one wording reserved from
training. Both leave out questions to which the right answer is empty. The third set,
`questions_handwritten.jsonl`, was written by hand and is not touched.
"""

from __future__ import annotations

import argparse
import json
import random
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from vllm_workflow.text2sql.shop.database import build
from vllm_workflow.text2sql.shop.grammar import Pair, sample_pairs
from vllm_workflow.text2sql.shop.phrasing import Split

HERE = Path(__file__).parent


def has_answer(connection: sqlite3.Connection, sql: str) -> bool:
    """Whether a query returns at least one row with a value other than NULL and 0."""
    return any(
        cell not in (None, 0) for row in connection.execute(sql).fetchmany(1) for cell in row
    )


def questions(split: Split, seed: int, count: int) -> Iterator[Pair]:
    """Draw `count` different questions that have an answer, at their natural frequency."""
    connection = build()
    seen: set[str] = set()
    for pair in sample_pairs(seed, split):
        if len(seen) == count:
            return
        if pair.question not in seen and has_answer(connection, pair.sql):
            seen.add(pair.question)
            yield pair


def write(path: Path, prefix: str, pairs: Iterator[Pair]) -> None:
    """Write one JSON object with id, question and sql per line."""
    with path.open("w", encoding="utf-8") as file:
        for number, pair in enumerate(pairs, 1):
            entry = {
                "id": f"{prefix}-{number:03d}",
                "question": pair.question,
                "sql": pair.sql,
            }
            file.write(json.dumps(entry) + "\n")


def suggestions(seed: int) -> Iterator[str]:
    """Yield questions the small model was trained to understand."""
    rng = random.Random(seed)
    for pair in questions(Split.TRAIN, rng.randrange(2**31), 10):
        yield pair.question


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=HERE, help="folder to write to (default: this folder)"
    )
    parser.add_argument(
        "--seed", type=int, default=4242, help="seed of the draw, any integer (default: 4242)"
    )
    parser.add_argument(
        "--count", type=int, default=240, help="in-grammar questions to write (default: 240)"
    )
    parser.add_argument(
        "--count-wording",
        type=int,
        default=200,
        help="questions with reserved wordings to write (default: 200)",
    )
    parser.add_argument(
        "--suggest",
        action="store_true",
        help="write nothing; print ten questions the small model should be able to answer",
    )
    args = parser.parse_args()
    if args.suggest:
        print("\n".join(suggestions(args.seed)))
        return
    write(args.out / "questions.jsonl", "shop", questions(Split.TRAIN, args.seed, args.count))
    write(
        args.out / "questions_wording.jsonl",
        "wording",
        questions(Split.WORDING, args.seed + 1, args.count_wording),
    )


if __name__ == "__main__":
    main()
