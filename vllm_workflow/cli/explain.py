"""`vllm-workflow explain`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from vllm_workflow.core.errors import ConfigError
from vllm_workflow.sim.explain import explain
from vllm_workflow.sim.explain_text import as_json, text
from vllm_workflow.sim.log_window import logged_lines
from vllm_workflow.sim.trace_decisions import is_decision_log


def add_parser(commands: Any) -> None:
    """Add the sub-command to what `ArgumentParser.add_subparsers` returned."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "explain",
        help="say why the calls of a run went where they did",
        description="Show every decision on the calls of a run: what each instance was predicted "
        "to cost in seconds, the slack then, which policy chose which instance and why, and what "
        "happened.",
    )
    parser.add_argument(
        "run_id",
        metavar="RUN_ID",
        help="X-Workflow-Id of the run; the request id of a call that belongs to none",
    )
    parser.add_argument(
        "log",
        type=Path,
        metavar="LOG",
        help="`decision_log` of a router, or the database of its `store`",
    )
    parser.add_argument("--tenant", help="of this tenant only (default: of any)")
    parser.add_argument("--json", action="store_true", help="print JSON (default: text)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Read, explain, print; return the exit status."""
    lines = logged_lines(args.log)
    place, first = lines[0]
    if not is_decision_log(first):
        place.fail("a decision log, whose first line is an event 'started'", dict(first))
    found = explain(lines, args.run_id, source=str(args.log))
    if args.tenant is not None:
        tenants = sorted({each.tenant_id for each in found})
        found = [each for each in found if each.tenant_id == args.tenant]
        if not found:
            raise ConfigError(f"--tenant: expected one of {tenants}, got {args.tenant!r}")
    shown = "\n\n".join(text(each) for each in found)
    if args.json:
        shown = json.dumps([as_json(each) for each in found], indent=1)
    try:
        print(shown, flush=True)
    except BrokenPipeError:  # whoever read has seen enough
        sys.stderr.close()
    return 0
