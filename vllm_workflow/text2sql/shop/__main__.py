"""`python -m vllm_workflow.text2sql.shop FILE`: write the shop database."""

from __future__ import annotations

import argparse
from pathlib import Path

from vllm_workflow.text2sql.shop.database import build


def main() -> None:
    """Write the database to a file that does not exist yet."""
    parser = argparse.ArgumentParser(
        prog="python -m vllm_workflow.text2sql.shop",
        description="Write the synthetic shop database that the small model knows.",
    )
    parser.add_argument("file", type=Path, help="SQLite file to make; must not exist yet")
    path: Path = parser.parse_args().file
    if path.exists():
        parser.error(f"{path} exists; nothing was written")
    build(path).close()


if __name__ == "__main__":
    main()
