"""`vllm-workflow simulate`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from vllm_workflow.cli.tune import add_fleet_flags, fleet_from, policy_from
from vllm_workflow.core.config import DEFAULT_POLICY
from vllm_workflow.core.errors import ConfigError
from vllm_workflow.core.policy_names import name_of
from vllm_workflow.router.store import is_store
from vllm_workflow.sim.arrivals import with_arrivals
from vllm_workflow.sim.bounds import with_slo_scale
from vllm_workflow.sim.declare import declared
from vllm_workflow.sim.fields import json_lines, read_text
from vllm_workflow.sim.log_tuner import as_happened
from vllm_workflow.sim.log_window import latest, read_window
from vllm_workflow.sim.trace_decisions import is_decision_log
from vllm_workflow.sim.what_if import (
    METRICS,
    Comparison,
    Scenario,
    added,
    compare,
    faster,
    promised,
    removed,
)
from vllm_workflow.sim.workloads import PREFIX, builtin_names, load

_DEFAULT_FLEET = "A100:2,A6000:1,L40S:1"


def add_parser(commands: Any) -> None:
    """Add the sub-command to what `ArgumentParser.add_subparsers` returned."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "simulate",
        help="what if the fleet, the load, the promises or the policy were others",
        description="Simulate traffic as it is and as it would be with other instances, at "
        "another rate, under other promises or another policy, on the same runs and arrivals.",
    )
    parser.add_argument(
        "traffic",
        metavar="TRAFFIC",
        help="a router's decision log or store, a trace, or one of " + ", ".join(builtin_names()),
    )
    _add_now(parser)
    add_fleet_flags(parser, f"the log's, as fast as it was; else {_DEFAULT_FLEET}")
    _add_what_if(parser)
    parser.add_argument(
        "--replicates",
        type=int,
        default=5,
        metavar="N",
        help="arrangements of the traffic, from 2; more give narrower intervals "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of generated runs, arrivals and arrangements"
    )
    parser.add_argument("--json", action="store_true", help="print JSON (default: a table)")
    parser.set_defaults(run=run)


def _add_now(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("as it is")
    group.add_argument(
        "--num-runs", type=int, metavar="N", help="runs (default: all; 100 of a generator)"
    )
    group.add_argument(
        "--request-rate",
        type=float,
        metavar="RATE",
        help="arrivals of runs per second (default: as in the log or trace)",
    )
    group.add_argument(
        "--slo-s", type=float, metavar="SECONDS", help="promise to each run (default: its own)"
    )
    group.add_argument(
        "--slo-multiple",
        type=float,
        default=5.0,
        metavar="X",
        help="for runs without a promise: so many times the least that each can take on the fleet "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--now-policy",
        metavar="POLICY",
        help=f"present policy (default: the log's; else {DEFAULT_POLICY})",
    )


def _add_what_if(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what if")
    group.add_argument(
        "--add",
        action="append",
        default=[],
        metavar="GPU[:COUNT]",
        help="with such instances too; they serve --model-shape (which a log needs)",
    )
    group.add_argument(
        "--remove",
        action="append",
        default=[],
        metavar="GPU[:COUNT]|ID",
        help="without these: a name, or the first so many whose names begin with GPU",
    )
    group.add_argument(
        "--rate-scale", type=float, default=1.0, metavar="X", help="arrivals X times as fast"
    )
    group.add_argument("--slo-scale", type=float, default=1.0, metavar="X", help="SLOs times X")
    group.add_argument(
        "--policy", metavar="POLICY", help="a preset, DISPATCH+ORDERING or a policy.json"
    )


def run(args: argparse.Namespace) -> int:
    """Simulate both sides, print; return the exit status."""
    now = _now(args)
    then = _then(args, now)
    found = compare(now, then, num_replicates=args.replicates, seed=args.seed)
    if args.json:
        print(json.dumps(_as_json(args, now, then, found), indent=1, allow_nan=False))
    else:
        print(_text(args, now, then, found))
    return 0


def _now(args: argparse.Namespace) -> Scenario:
    scenario = _logged(args) if _is_log(args.traffic) else _traced(args)
    runs = scenario.runs
    if args.slo_s is not None:
        if not args.slo_s > 0.0:
            raise ConfigError(f"--slo-s: expected a number above 0, got {args.slo_s:g}")
        runs = tuple(replace(each, slo_s=args.slo_s) for each in runs)
    elif not args.slo_multiple > 0.0:
        raise ConfigError(f"--slo-multiple: expected a number above 0, got {args.slo_multiple:g}")
    else:
        least = with_slo_scale(runs, args.slo_multiple, scenario.fleet)
        runs = tuple(
            other if each.slo_s is None else each for each, other in zip(runs, least, strict=True)
        )
    if args.now_policy:
        policy = policy_from(args.now_policy, "--now-policy")
        scenario = replace(scenario, policy=policy)
    return replace(scenario, runs=runs)


def _is_log(traffic: str) -> bool:
    if traffic.startswith(PREFIX):
        return False
    path = Path(traffic)
    if is_store(path):
        return True
    text = read_text(path)
    if text.lstrip().startswith("["):
        return False
    _, first = next(json_lines(text, traffic))
    return isinstance(first, dict) and is_decision_log(first)


def _logged(args: argparse.Namespace) -> Scenario:
    """Return what a log tells, on instances as fast as they were."""
    if args.request_rate is not None:
        raise ConfigError("--request-rate: expected --rate-scale with a decision log")
    log = read_window(Path(args.traffic))
    if args.num_runs is not None:
        if args.num_runs < 1:
            raise ConfigError(f"--num-runs: expected an integer from 1, got {args.num_runs}")
        log = latest(log, args.num_runs)
    if not log.runs:
        raise ConfigError(f"{args.traffic}: expected at least one run that ended, got none")
    window = as_happened(log, fleet=fleet_from(args) if args.fleet else None)
    return Scenario(
        runs=window.runs,
        fleet=window.fleet,
        policy=log.policy,
        workflows=window.workflows,
        tenants=window.tenants,
        uncounted=window.uncounted if len(window.uncounted) < len(window.runs) else frozenset(),
    )


def _traced(args: argparse.Namespace) -> Scenario:
    trace = load(args.traffic, args.num_runs, args.seed)
    if args.request_rate is None and trace.runs[0].arrival_s is None:
        raise ConfigError(
            f"--request-rate: expected a number, since {trace.source} has no arrivals"
        )
    trace = with_arrivals(trace, args.request_rate, seed=args.seed)
    return Scenario(
        runs=trace.runs,
        fleet=fleet_from(args, args.fleet or _DEFAULT_FLEET),
        policy=policy_from(DEFAULT_POLICY, "policy"),
        workflows=declared(trace.runs),
    )


def _then(args: argparse.Namespace, now: Scenario) -> Scenario:
    if args.add and args.model_shape is None and _is_log(args.traffic):
        raise ConfigError(
            "--add: expected --model-shape beside it, and --weight-bits and --tp where they are "
            "not 4 and 1: a decision log does not say what its instances serve"
        )
    fleet = now.fleet
    for what in args.remove:
        fleet = removed(fleet, what)
    for what in args.add:
        fleet = added(fleet, fleet_from(args, what))
    runs = faster(now.runs, args.rate_scale)
    if args.slo_scale != 1.0:
        runs = promised(runs, args.slo_scale)
    policy = policy_from(args.policy, "--policy") if args.policy else now.policy
    return replace(now, runs=runs, fleet=fleet, policy=policy)


def _text(
    args: argparse.Namespace, now: Scenario, then: Scenario, found: Sequence[Comparison]
) -> str:
    lines = [
        f"level 1; {args.traffic}, {len(now.runs)} runs, {args.replicates} arrangements of them, "
        f"seed {args.seed}",
        f"now:     {_what(now)}",
        f"what if: {_what(then)}",
        "",
        f"{'':11} {'now':>10} {'what if':>10} {'difference, 95 % interval':>32}",
    ]
    for each in found:
        change = each.difference
        interval = f"{change.mean:+.3g} ({change.low:+.3g} to {change.high:+.3g})"
        lines.append(
            f"{each.metric:11} {each.now.mean:10.3g} {each.then.mean:10.3g} {interval:>32}"
        )
    lines += ["", *(f"{each.metric}: {METRICS[each.metric]}" for each in found)]
    return "\n".join(lines)


def _what(scenario: Scenario) -> str:
    names = ", ".join(each.instance.instance_id for each in scenario.fleet)
    slos = [run.slo_s for run in scenario.runs if run.slo_s is not None]
    promise = f"SLO {sum(slos) / len(slos):.3g} s on average" if slos else "no SLO"
    rate = _rate(scenario)
    policy = f"policy {name_of(scenario.policy)} {scenario.policy.fingerprint}"
    return f"{names}; {rate:.3g} runs/s, {promise}, {policy}"


def _rate(scenario: Scenario) -> float:
    span_s = (scenario.runs[-1].arrival_s or 0.0) - (scenario.runs[0].arrival_s or 0.0)
    return (len(scenario.runs) - 1) / span_s if span_s > 0.0 else 0.0


def _as_json(
    args: argparse.Namespace, now: Scenario, then: Scenario, found: Sequence[Comparison]
) -> dict[str, Any]:
    return {
        "level": 1,
        "traffic": args.traffic,
        "num_runs": len(now.runs),
        "replicates": args.replicates,
        "seed": args.seed,
        "now": _side(now),
        "what_if": _side(then),
        "metrics": {
            each.metric: {**asdict(each), "metric": METRICS[each.metric]} for each in found
        },
    }


def _side(scenario: Scenario) -> dict[str, Any]:
    return {
        "instances": [each.instance.instance_id for each in scenario.fleet],
        "rate": _rate(scenario),
        "policy": asdict(scenario.policy),
        "fingerprint": scenario.policy.fingerprint,
    }
