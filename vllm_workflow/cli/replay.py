"""`vllm-workflow replay`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm_workflow.core.errors import ConfigError
from vllm_workflow.core.events import Event, from_json
from vllm_workflow.core.replay import replay
from vllm_workflow.core.types import Decision
from vllm_workflow.sim.log_window import logged_lines
from vllm_workflow.sim.trace_decisions import is_decision_log


def add_parser(commands: Any) -> None:
    """Add the sub-command to what `ArgumentParser.add_subparsers` returned."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "replay",
        help="do again what a router decided, and compare",
        description="Do again what a router decided, from its decision log, and compare. "
        "Exit status: 0 if all are the same, 1 if one is not, which is shown.",
    )
    parser.add_argument(
        "log",
        type=Path,
        metavar="LOG",
        help="`decision_log` of a router, or the database of its `store`",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Replay, print; return the exit status."""
    num_decisions = 0
    try:
        for then, now in replay(_events(args.log)):
            num_decisions += 1
            if then != now:
                print(f"decision {num_decisions} differs")
                print(f"recorded: {_told(then)}\nnow:      {_told(now)}")
                return 1
    except ConfigError:
        raise
    except (KeyError, ValueError) as e:  # a line is missing, or there twice
        raise ConfigError(
            f"{args.log}: decision {num_decisions + 1}: expected a log without gaps, got {e}"
        ) from None
    print(f"{num_decisions} decisions, all as recorded")
    return 0


def _events(log: Path) -> Iterator[Event]:
    lines = logged_lines(log)
    place, first = lines[0]
    if not is_decision_log(first):
        place.fail("a decision log, whose first line is an event 'started'", dict(first))
    for place, data in lines:
        try:
            yield from_json(json.dumps(data))
        except ConfigError as e:
            raise ConfigError(f"{place}: {e}") from None


def _told(decision: Decision | None) -> str:
    return "the call waits" if decision is None else str(decision)
