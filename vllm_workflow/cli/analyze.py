"""`vllm-workflow analyze`."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vllm_workflow.bench.analysis import analyze
from vllm_workflow.bench.analysis_text import report
from vllm_workflow.core.errors import ConfigError
from vllm_workflow.core.hardware import WEIGHT_BITS
from vllm_workflow.profiles import catalogue
from vllm_workflow.sim.workloads import DEFAULT_NUM_RUNS, builtin_names, load


def add_parser(commands: Any) -> None:
    """Add the sub-command to what `ArgumentParser.add_subparsers` returned."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "analyze",
        help="report what the runs of a trace have in common",
        description="Analyse the runs of a trace: stages, tokens, critical path, calls side by "
        "side, shared prefixes, what can be predicted, what makes slow runs slow.",
    )
    parser.add_argument(
        "trace",
        metavar="TRACE",
        help="a file (JSONL of runs, Hexgen, Mooncake, or a router's decision log) or one of "
        + ", ".join(builtin_names()),
    )
    parser.add_argument(
        "--num-runs",
        type=int,
        metavar="N",
        help=f"runs to analyse (default: all of a file, {DEFAULT_NUM_RUNS} of a generator)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of a generator (default: 0)")
    parser.add_argument(
        "--distinct", action="store_true", help="leave out runs that repeat an earlier one"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with plots")
    _add_hardware(parser)
    parser.set_defaults(run=run)


def _add_hardware(parser: argparse.ArgumentParser) -> None:
    hardware = parser.add_argument_group("hardware", "that tokens are turned into seconds for")
    hardware.add_argument(
        "--gpu",
        default="A100-80G",
        metavar="NAME",
        help=f"{', '.join(catalogue.gpu_names())} (default: %(default)s)",
    )
    hardware.add_argument(
        "--model-shape",
        default="llama-3.1-70b",
        metavar="NAME",
        help=f"{', '.join(catalogue.shape_names())} (default: %(default)s)",
    )
    hardware.add_argument(
        "--tp", type=int, default=4, metavar="N", help="tensor-parallel size (default: %(default)s)"
    )
    hardware.add_argument(
        "--weight-bits",
        type=int,
        choices=WEIGHT_BITS,
        default=16,
        help="bits of a weight (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Load, analyse, print, write; return the exit status."""
    for path in (args.json, args.html):
        if path is not None and not path.resolve().parent.is_dir():
            raise ConfigError(f"{path}: expected a file in an existing directory")
    trace = load(args.trace, args.num_runs, args.seed)
    if args.distinct:
        trace = trace.distinct()
    profile = catalogue.profile(
        args.gpu, args.model_shape, tp=args.tp, weight_bits=args.weight_bits
    )
    analysis = analyze(trace, profile)
    print(report(analysis))
    if args.json is not None:
        _write(args.json, json.dumps(asdict(analysis), indent=1, allow_nan=False) + "\n")
    if args.html is not None:
        from vllm_workflow.bench.analysis_page import page  # matplotlib takes a second to import

        _write(args.html, page(analysis))
    return 0


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as e:
        raise ConfigError(f"{path}: cannot write: {e.strerror}") from None
    print(f"wrote {path}")
