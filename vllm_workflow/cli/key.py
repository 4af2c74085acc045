"""`vllm-workflow key`."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from vllm_workflow.core.errors import ConfigError
from vllm_workflow.router.credentials import KeyHash, new_key
from vllm_workflow.router.wire import MAX_LABEL_LENGTH, is_label


def add_parser(commands: Any) -> None:
    """Add the sub-command to what `ArgumentParser.add_subparsers` returned."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "key",
        help="make keys for clients and operators of the router",
        description="Make keys for clients and operators of the router.",
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    new = actions.add_parser(
        "new",
        help="make a key",
        description="Print a new key once, and what router.yaml keeps of it: a hash. The key "
        "goes to stdout, all else to stderr, so that `… > FILE` keeps the key alone.",
    )
    owner = new.add_mutually_exclusive_group(required=True)
    owner.add_argument("--tenant", metavar="T", help="whose calls are made with it")
    owner.add_argument("--admin", action="store_true", help="for the operators' port")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Make a key; return the exit status."""
    if not args.admin and not is_label(args.tenant):
        raise ConfigError(
            f"--tenant: expected 1 to {MAX_LABEL_LENGTH} printable ASCII characters, "
            f"got {args.tenant!a:.80}"
        )
    key = new_key()
    hashed = KeyHash.of(key)
    print("The key, which is not shown again:", file=sys.stderr, flush=True)
    print(key, flush=True)
    if args.admin:
        lines = ["admin:", f'  key_hash: "{hashed}"']
    else:
        tenant = args.tenant.replace("\\", "\\\\").replace('"', '\\"')
        lines = ["auth:", "  keys:", f'    - {{tenant: "{tenant}", key_hash: "{hashed}"}}']
    print("For router.yaml:", *lines, sep="\n", file=sys.stderr)
    return 0
