"""The flags of `vllm-workflow bench serve`."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from vllm_workflow.bench.serve import OUTPUT_LENGTHS, ServeOptions
from vllm_workflow.profiles import catalogue
from vllm_workflow.sim.workloads import builtin_names

_DEFAULTS = ServeOptions()


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `bench serve`."""
    _add_target(parser.add_argument_group("target"))
    _add_load(parser.add_argument_group("load"))
    _add_slo(parser.add_argument_group("SLO"))
    _add_requests(parser.add_argument_group("requests"))
    _add_output(parser.add_argument_group("results"))


def _add_target(group: Any) -> None:
    group.add_argument(
        "--backend",
        choices=("openai", "vllm"),
        default=_DEFAULTS.backend,
        help="both mean streamed /v1/completions (default: %(default)s)",
    )
    group.add_argument("--base-url", metavar="URL", help="root of the server, in place of:")
    group.add_argument("--host", default="127.0.0.1", help="(default: %(default)s)")
    group.add_argument("--port", type=int, default=8000, help="(default: %(default)s)")
    group.add_argument(
        "--endpoint", default=_DEFAULTS.endpoint, metavar="PATH", help="(default: %(default)s)"
    )
    group.add_argument("--model", default="", help="(default: the first that the server lists)")
    group.add_argument(
        "--header", nargs="*", default=[], metavar="KEY=VALUE", help="sent with each request"
    )
    group.add_argument(
        "--ready-check-timeout-sec",
        type=float,
        default=_DEFAULTS.ready_check_timeout_sec,
        metavar="S",
        help="wait so long for the server; 0 does not wait (default: %(default)g)",
    )
    group.add_argument(
        "--emulated-server",
        action="append",
        default=[],
        metavar="URL",
        help="root of a server with an emulated GPU, whose lateness is read before and after; "
        "repeatable",
    )


def _add_load(group: Any) -> None:
    group.add_argument(
        "--dataset-path",
        "--trace",
        default="builtin:chess",
        metavar="TRACE",
        help=f"a file of runs, or one of {', '.join(builtin_names())} (default: %(default)s)",
    )
    group.add_argument(
        "--num-prompts",
        type=int,
        metavar="N",
        help="runs (default: all of a file, 100 of a generator)",
    )
    group.add_argument(
        "--request-rate",
        type=float,
        default=math.inf,
        metavar="R",
        help="arrivals of runs per second; inf lets all arrive at once (default: %(default)s)",
    )
    group.add_argument(
        "--burstiness",
        type=float,
        default=1.0,
        metavar="B",
        help="shape of the gamma distribution of the time between arrivals: 1 is a Poisson "
        "process, less comes in bursts, more is more regular (default: %(default)g)",
    )
    group.add_argument(
        "--self-timed",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="runs arrive when the trace says, not by --request-rate (default: no)",
    )
    group.add_argument(
        "--max-concurrency",
        type=int,
        metavar="N",
        help="runs at a time; the others wait (default: no limit)",
    )
    group.add_argument(
        "--time-scale",
        type=float,
        default=_DEFAULTS.time_scale,
        metavar="X",
        help="the servers were started with --emulate-time-scale X: replay the trace as fast, with "
        "SLOs as short, and report durations times X (default: %(default)g)",
    )
    group.add_argument(
        "--num-warmups",
        type=int,
        default=0,
        metavar="N",
        help="further runs of the trace, replayed before and not counted (default: %(default)s)",
    )
    group.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of generated runs and of arrivals (default: %(default)s)",
    )


def _add_slo(group: Any) -> None:
    which = group.add_mutually_exclusive_group()
    which.add_argument(
        "--slo-s",
        type=float,
        metavar="S",
        help="promised duration of every run (default: what the trace says, if anything)",
    )
    which.add_argument(
        "--slo-scale",
        type=float,
        metavar="X",
        help="promise each run X times the least it can take, alone and with every shared prefix "
        "cached, on --fleet",
    )
    group.add_argument(
        "--fleet",
        metavar="FLEET",
        help="GPU:COUNT,… or a YAML file: what SLO scales refer to, see --slo-scale; without it "
        "they are multiples of the SLO",
    )
    group.add_argument(
        "--model-shape",
        default="llama-3.1-8b",
        metavar="NAME",
        help=f"on --fleet: {', '.join(catalogue.shape_names())} (default: %(default)s)",
    )


def _add_requests(group: Any) -> None:
    identity = _DEFAULTS.identity
    group.add_argument(
        "--workflow-headers",
        action=argparse.BooleanOptionalAction,
        default=identity.headers,
        help="tell run, stage and what is left of the SLO in X-Workflow-* headers, for "
        "vllm-workflow's router (default: yes)",
    )
    group.add_argument(
        "--workflow-xargs",
        action="store_true",
        help="tell them in vllm_xargs, for a bare vLLM with --scheduler workflow (default: no)",
    )
    group.add_argument(
        "--agentic-context",
        action="store_true",
        help="tell them in vllm_xargs.agentic_context, for vllm-router's program scheduling; vLLM "
        "itself refuses it (default: no)",
    )
    group.add_argument(
        "--output-length",
        choices=OUTPUT_LENGTHS,
        default=_DEFAULTS.output_length,
        help="exact: max_tokens is the trace's length, with ignore_eos; hidden: max_tokens is "
        "--max-tokens and only a server with an emulated GPU knows the length, as nobody knows "
        "that of a real answer before its end (default: %(default)s)",
    )
    group.add_argument(
        "--max-tokens",
        type=int,
        metavar="N",
        help="of every call, with --output-length hidden (default: the trace's longest answer)",
    )
    group.add_argument(
        "--vocab-size",
        type=int,
        metavar="N",
        help="prompts are token ids below N (default: tokens that the server's /tokenize gives)",
    )
    group.add_argument(
        "--extra-body", default="{}", metavar="JSON", help="further fields of each request's body"
    )
    group.add_argument(
        "--call-timeout-s",
        type=float,
        default=_DEFAULTS.call_timeout_s,
        metavar="S",
        help="after which a call has failed, and its run with it (default: %(default)g)",
    )
    group.add_argument(
        "--request-id-prefix",
        default=_DEFAULTS.request_id_prefix,
        metavar="TEXT",
        help="before each run's id; prompts depend on it too (default: one that no other load has, "
        "so that nothing of others is in the servers' prefix caches)",
    )


def _add_output(group: Any) -> None:
    group.add_argument(
        "--percentile-metrics",
        default=",".join(_DEFAULTS.percentile_metrics),
        metavar="NAMES",
        help="comma-separated (default: %(default)s)",
    )
    group.add_argument(
        "--metric-percentiles",
        default=",".join(f"{p:g}" for p in _DEFAULTS.metric_percentiles),
        metavar="P",
        help="comma-separated (default: %(default)s)",
    )
    group.add_argument(
        "--goodput",
        nargs="+",
        default=[],
        metavar="KEY:MS",
        help="a run is good if it took at most e2el, and each of its calls ttft and tpot "
        "(default: if it met its SLO)",
    )
    group.add_argument("--save-result", action="store_true", help="save the result as JSON")
    group.add_argument("--save-detailed", action="store_true", help="with every call of every run")
    group.add_argument(
        "--result-dir",
        type=Path,
        default=Path(),
        metavar="DIR",
        help="made if it is not there (default: here)",
    )
    group.add_argument(
        "--result-filename",
        metavar="NAME",
        help="(default: {label or backend}-{rate}qps-{model}-{date}.json)",
    )
    group.add_argument("--label", help="name of the system, in results and plots")
    group.add_argument(
        "--metadata", nargs="*", default=[], metavar="KEY=VALUE", help="further keys of the result"
    )
    group.add_argument("--html", type=Path, metavar="FILE", help="write a report with plots")
    group.add_argument("--disable-tqdm", action="store_true", help="no progress bar")
