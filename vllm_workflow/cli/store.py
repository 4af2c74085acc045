"""`vllm-workflow store`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from vllm_workflow.router.store import StoreReader


def add_parser(commands: Any) -> None:
    """Add the sub-command to what `ArgumentParser.add_subparsers` returned."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "store",
        help="show what a router keeps in its database",
        description="Print what the database named by `store: {path: …}` in router.yaml holds, as "
        "lines of JSON. The router may be running.",
    )
    parser.add_argument("path", type=Path, metavar="FILE", help="the database")
    parser.add_argument(
        "what",
        choices=("usage", "events", "tunings"),
        help="usage: calls, tokens and seconds of each tenant and day (UTC); events: the decision "
        "log, as `decision_log` in router.yaml writes it; tunings: what the tuner has found",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print what was asked for; return the exit status.

    Raises:
        ConfigError: The file cannot be read, or is no such database.
    """
    with StoreReader(args.path) as reader:
        try:
            for line in _lines(reader, args.what):
                print(line)
        except BrokenPipeError:  # whoever read has seen enough
            sys.stderr.close()
    return 0


def _lines(reader: StoreReader, what: str) -> Iterator[str]:
    if what == "events":
        yield from reader.events()
        return
    rows: Iterable[Any] = reader.usage() if what == "usage" else reader.tunings()
    for row in rows:
        yield json.dumps(row)
