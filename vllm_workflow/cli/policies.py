"""`vllm-workflow policies`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from vllm_workflow.core import policy_names
from vllm_workflow.core.config import DEFAULT_POLICY
from vllm_workflow.core.policy_names import About


def add_parser(commands: Any) -> None:
    """Add the sub-command to what `ArgumentParser.add_subparsers` returned."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "policies",
        help="list the policies by name",
        description="List the policies by name. `--policy` of the router, `policy` in router.yaml "
        "and VLLM_WORKFLOW_POLICY at an engine take a preset or DISPATCH+ORDERING, "
        "e.g. hexgen+urgency, with +late or +late+relegate behind it.",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object, with the fields and the fingerprint of each policy "
        "(default: a table)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the names; return the exit status."""
    if args.json:
        print(json.dumps(as_json(), indent=2, ensure_ascii=False))
        return 0
    named = {name: policy_names.describe(name) for name in policy_names.ALL}
    baselines = {name: named[name] for name in policy_names.BASELINES}
    others = {n: about for n, about in named.items() if n not in {*baselines, DEFAULT_POLICY}}
    options = {f"+{name}": about for name, about in policy_names.OPTION.items()}
    sections = {
        "presets": policy_names.PRESET,
        "dispatch: which instance runs a call": policy_names.DISPATCH,
        "ordering: which waiting call runs first": policy_names.ORDERING,
        "behind DISPATCH+ORDERING; +relegate only after +late, neither with round-robin": options,
        "baselines, as DISPATCH+ORDERING": baselines,
        "further combinations; those not listed work too": others,
        "searches in hindsight, of benchmarks only": policy_names.SEARCH,
    }
    print("\n\n".join(_section(title, names) for title, names in sections.items()))
    return 0


def as_json() -> dict[str, Any]:
    """Everything that there is to say, for programs."""
    return {
        "default": DEFAULT_POLICY,
        "presets": _abouts(policy_names.PRESET),
        "dispatch": _abouts(policy_names.DISPATCH),
        "ordering": _abouts(policy_names.ORDERING),
        "searches": _abouts(policy_names.SEARCH),
        "baselines": list(policy_names.BASELINES),
        "policies": [_policy(name) for name in policy_names.ALL],
    }


def _policy(name: str) -> dict[str, Any]:
    config = policy_names.parse(name)
    return {
        "name": name,
        **asdict(policy_names.describe(name)),
        "fingerprint": config.fingerprint,
        "fields": asdict(config),
    }


def _abouts(names: Mapping[str, About]) -> dict[str, Any]:
    return {name: asdict(about) for name, about in names.items()}


def _section(title: str, names: Mapping[str, About]) -> str:
    width = max(map(len, names))
    lines = (
        f"  {name:<{width}}  {about.what}" + (f" ({about.source})" if about.source else "")
        for name, about in names.items()
    )
    return "\n".join((title, *lines))
