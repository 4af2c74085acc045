"""`vllm-workflow tune`."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vllm_workflow.core.config import PolicyConfig
from vllm_workflow.core.errors import ConfigError
from vllm_workflow.core.policy_grid import Grid, default_grid, points
from vllm_workflow.sim.fleet import SimInstance, fleet_of
from vllm_workflow.sim.log_tuner import LogVerdict, tune_log
from vllm_workflow.sim.log_window import read_window
from vllm_workflow.sim.policy_files import append_history, write_policy
from vllm_workflow.sim.tuner import TunerSettings
from vllm_workflow.sim.tuner_report import as_json, text

_SETTINGS = TunerSettings()

_DEFAULT_SHAPE = "llama-3.1-70b"


def add_parser(commands: Any) -> None:
    """Add the sub-command to what `ArgumentParser.add_subparsers` returned."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "tune",
        help="find a better policy for the traffic of a decision log",
        description="Replay the traffic of a router's decision log under other policies, by "
        "simulation, and say whether one of them is better by more than chance.",
    )
    parser.add_argument("log", type=Path, metavar="LOG", help="`decision_log` of a router")
    _add_what(parser)
    add_fleet_flags(parser, "the log's instances, corrected to be as fast as they were")
    _add_how(parser)
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="write the policy to use, the better one or else the present one, as policy.json",
    )
    parser.add_argument(
        "--history", type=Path, metavar="FILE", help="append the verdict as a line of JSON"
    )
    parser.add_argument("--json", action="store_true", help="print JSON (default: a table)")
    parser.set_defaults(run=run)


def _add_what(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--policy",
        metavar="POLICY",
        help="present policy: a preset, DISPATCH+ORDERING or a policy.json (default: the log's)",
    )
    parser.add_argument(
        "--engine-policy",
        metavar="POLICY",
        help="policy of the engines, which a router does not change (default: the one that the "
        "router began with)",
    )
    parser.add_argument(
        "--grid",
        action="append",
        metavar="FIELD=VALUE,…",
        help="values of a field of policy.json to try, in all combinations with other --grid "
        "(default: alpha for hexgen, else ordering, late_binding, relegate, relegation_margin)",
    )
    parser.add_argument(
        "--window-s",
        type=float,
        default=math.inf,
        metavar="SECONDS",
        help="how far back from the end of the log (default: all since the router was started)",
    )
    parser.add_argument(
        "--max-runs",
        type=int,
        metavar="N",
        help="use the last so many runs only (default: all of the window)",
    )


def _add_how(parser: argparse.ArgumentParser) -> None:
    for name, kind, what in (
        ("min_runs", int, "whole runs that the window must have"),
        ("num_replicates", int, "arrangements that the best is held against the present one on"),
        ("confidence", float, "that the gain is more than --min-gain, above 0.5 and below 1"),
        ("min_gain", float, "gain that a change must bring, in shares of runs on time, from 0"),
        ("p95_weight", float, "gain of a P95 that is e times shorter; 0 ignores P95"),
        ("seed", int, "of the arrangements"),
    ):
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=kind,
            default=getattr(_SETTINGS, name),
            metavar="N" if kind is int else "X",
            help=f"{what} (default: %(default)s)",
        )


def add_fleet_flags(parser: argparse.ArgumentParser, default: str) -> None:
    """Add the flags that say what runs are simulated on."""
    group = parser.add_argument_group("fleet")
    group.add_argument(
        "--fleet", metavar="FLEET", help=f"GPU:COUNT,… or a YAML file (default: {default})"
    )
    group.add_argument(
        "--model-shape",
        metavar="NAME",
        help=f"model that every instance of --fleet serves (default: {_DEFAULT_SHAPE})",
    )
    group.add_argument(
        "--weight-bits",
        type=int,
        choices=(4, 8, 16),
        default=4,
        help="of its weights (default: %(default)s)",
    )
    group.add_argument("--tp", type=int, default=1, help="GPUs per instance (default: %(default)s)")
    group.add_argument(
        "--gpu-memory-utilization",
        type=float,
        default=0.95,
        help="share of each GPU's memory that vLLM may use (default: %(default)s)",
    )


def fleet_from(args: argparse.Namespace, spec: str | None = None) -> tuple[SimInstance, ...]:
    """Build the fleet of `--fleet`, or of `spec` with the same other flags.

    Raises:
        ConfigError: See `fleet_of`.
    """
    return fleet_of(
        spec or args.fleet,
        model_shape=args.model_shape or _DEFAULT_SHAPE,
        tp=args.tp,
        weight_bits=args.weight_bits,
        gpu_memory_utilization=args.gpu_memory_utilization,
    )


def policy_from(name: str, flag: str) -> PolicyConfig:
    """Return the policy of a flag: a name, or the path of a `policy.json`.

    Raises:
        ConfigError: Unknown name, or a file that cannot be used.
    """
    if name.endswith(".json") or "/" in name:
        return PolicyConfig.from_file(name)
    return PolicyConfig.from_name(name, source=flag)


def run(args: argparse.Namespace) -> int:
    """Tune, print, write; return the exit status."""
    settings = TunerSettings(**{f.name: getattr(args, f.name) for f in fields(TunerSettings)})
    if not args.window_s > 0.0:
        raise ConfigError(f"--window-s: expected a number above 0, got {args.window_s:g}")
    if args.max_runs is not None and args.max_runs < 1:
        raise ConfigError(f"--max-runs: expected an integer from 1, got {args.max_runs}")
    log = read_window(args.log, window_s=args.window_s)
    incumbent = policy_from(args.policy, "--policy") if args.policy else log.policy
    grid = grid_from(args.grid) if args.grid else default_grid(incumbent)
    found = tune_log(
        log,
        points(incumbent, grid, source="--grid"),
        settings,
        incumbent=incumbent,
        fleet=fleet_from(args) if args.fleet else None,
        engine_policy=policy_from(args.engine_policy, "--engine-policy")
        if args.engine_policy
        else None,
        max_runs=args.max_runs,
    )
    entry = as_json(found)
    print(json.dumps(entry, indent=1) if args.json else text(found))
    _write(args, found, entry)
    return 0


def _write(args: argparse.Namespace, found: LogVerdict, entry: dict[str, Any]) -> None:
    if args.history:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        append_history(args.history, {"time": now, **entry})
    if args.output:
        write_policy(args.output, found.verdict.policy)


def grid_from(flags: Sequence[str]) -> Grid:
    """Read `--grid FIELD=VALUE,…`; values as in JSON, words without quotes.

    Raises:
        ConfigError: Not of that form, or a field twice.
    """
    grid: dict[str, list[object]] = {}
    for flag in flags:
        name, equals, values = flag.partition("=")
        if not equals or not name or not values:
            raise ConfigError(f"--grid: expected FIELD=VALUE,…, got {flag!r}")
        if name in grid:
            raise ConfigError(f"--grid: {name}: expected once, got twice")
        grid[name] = [_value(word) for word in values.split(",")]
    return grid


def _value(word: str) -> object:
    try:
        return json.loads(word)
    except ValueError:
        return word
