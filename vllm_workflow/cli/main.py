"""The `vllm-workflow` command."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from vllm_workflow.core.errors import WorkflowError

COMMANDS = {
    "up": "start the instances and the router of one machine",
    "analyze": "report what the runs of a trace have in common",
    "bench": "replay runs against a server under load",
    "emulated-model": "write a model folder without weights, for an emulated GPU",
    "key": "make keys for clients and operators of the router",
    "explain": "say why the calls of a run went where they did",
    "policies": "list the policies by name",
    "profile": "measure a vLLM server and write its latency profile",
    "replay": "do again what a router decided, and compare",
    "router": "dispatch OpenAI-compatible calls over several vLLM servers",
    "store": "show what a router keeps in its database",
    "simulate": "what if the fleet, the load, the promises or the policy were others",
    "text2sql": "answer questions about a SQLite file by a multi-stage workflow",
    "tune": "find a better policy for the traffic of a decision log",
}
"""Sub-command to its one-line help. Each lives in the module of its name, which is imported
only when asked for, so that one half of the package works without the other's libraries."""

_EXTRAS = {
    "analyze": "bench",
    "bench": "bench",
    "emulated-model": "vllm",
    "profile": "bench",
    "text2sql": "text2sql",
}
"""What brings the packages that a command needs, other than `router`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="vllm-workflow",
        description="End-to-end deadlines for multi-stage LLM workflows on vLLM.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    chosen = next((word for word in argv if not word.startswith("-")), None)
    for name, text in COMMANDS.items():
        if name == chosen:
            _load(name).add_parser(commands)
        else:
            commands.add_parser(name, help=text, add_help=False)
    args = parser.parse_args(argv)
    try:
        status: int = args.run(args)
        sys.stdout.flush()
    except WorkflowError as e:
        print(f"vllm-workflow: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return status


def _load(name: str):  # type: ignore[no-untyped-def]
    """Import a command's module, or say which extra brings what it needs."""
    try:
        return import_module(f"vllm_workflow.cli.{name.replace('-', '_')}")
    except ModuleNotFoundError as e:
        if e.name is not None and e.name.startswith("vllm_workflow"):
            raise
        extra = _EXTRAS.get(name, "router")
        raise SystemExit(
            f"vllm-workflow {name}: Python package {e.name!r} is missing; "
            f"install it with: pip install 'vllm-workflow[{extra}]'"
        ) from None


if __name__ == "__main__":
    sys.exit(main())
