"""`vllm-workflow bench`."""

from __future__ import annotations

import argparse
import asyncio
import json
import math
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

from vllm_workflow.bench import serve as bench
from vllm_workflow.bench.console import result_table
from vllm_workflow.bench.identity import Identity
from vllm_workflow.bench.replay import PlannedRun
from vllm_workflow.bench.results import METRICS, parse_goodput
from vllm_workflow.bench.serve import ServeOptions, ServeResult, serve
from vllm_workflow.bench.serve_report import serve_report
from vllm_workflow.cli.bench_flags import add_flags
from vllm_workflow.core.errors import ConfigError, because
from vllm_workflow.sim.arrivals import with_arrivals
from vllm_workflow.sim.bounds import critical_path_s
from vllm_workflow.sim.fleet import SimInstance, fleet_of
from vllm_workflow.sim.types import Trace, TraceRun
from vllm_workflow.sim.workloads import load

_DEFAULTS = ServeOptions()
_SECRET_FLAGS = ("header",)


def add_parser(commands: Any) -> None:
    """Add the sub-command to what `ArgumentParser.add_subparsers` returned."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "bench", help="measure a server under load", description="Measure a server under load."
    )
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    serve_parser = kinds.add_parser(
        "serve",
        help="replay runs against an OpenAI-compatible server",
        description="Replay runs of a trace against any OpenAI-compatible server: a router or a "
        "bare vLLM. Flags that `vllm bench serve` has mean the same here, with a run, not a call, "
        "in the place of a request.",
    )
    add_flags(serve_parser)
    serve_parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Load the server, print, save; return the exit status."""
    options = _options(args)
    metadata = _pairs(args.metadata, "--metadata")
    _check_outputs(args)
    trace, warmups = _trace(args)
    planned, conditions = _planned(args, trace)
    longest = max((c.num_output_tokens for each in trace.runs for c in each.calls), default=1)
    options = replace(options, max_tokens=args.max_tokens or max(1, longest))
    result = _measured(options, planned, warmups)
    document = bench.document(
        result,
        options,
        num_prompts=len(planned),
        request_rate=None if args.self_timed else args.request_rate,
        burstiness=args.burstiness,
        label=args.label,
        metadata=metadata,
        conditions={**conditions, "flags": _flags(args)},
        detailed=args.save_detailed,
    )
    print(result_table(document))
    if args.save_result or args.save_detailed:
        path = args.result_dir / (args.result_filename or _filename(args, result.model))
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        print(f"wrote {path}")
    if args.html:
        args.html.write_text(serve_report(document, result.runs), encoding="utf-8")
        print(f"wrote {args.html}")
    return 0


def _measured(
    options: ServeOptions, planned: list[PlannedRun], warmups: list[PlannedRun]
) -> ServeResult:
    try:
        import uvloop
    except ImportError:
        factory = None
    else:
        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(serve(options, planned, warmups))


def _options(args: argparse.Namespace) -> ServeOptions:
    return ServeOptions(
        base_url=args.base_url or f"http://{args.host}:{args.port}",
        endpoint=args.endpoint,
        backend=args.backend,
        model=args.model,
        header=_pairs(args.header, "--header"),
        extra_body=_extra_body(args.extra_body),
        request_id_prefix=args.request_id_prefix,
        identity=Identity(
            headers=args.workflow_headers,
            xargs=args.workflow_xargs,
            agentic_context=args.agentic_context,
        ),
        output_length=args.output_length,
        max_tokens=_DEFAULTS.max_tokens if args.max_tokens is None else args.max_tokens,
        vocab_size=args.vocab_size,
        max_concurrency=args.max_concurrency,
        time_scale=args.time_scale,
        call_timeout_s=args.call_timeout_s,
        ready_check_timeout_sec=args.ready_check_timeout_sec,
        emulated_servers=tuple(args.emulated_server),
        percentile_metrics=_metrics(args.percentile_metrics),
        metric_percentiles=_percentiles(args.metric_percentiles),
        goodput=MappingProxyType(parse_goodput(args.goodput)),
        disable_tqdm=args.disable_tqdm,
    )


def _trace(args: argparse.Namespace) -> tuple[Trace, list[PlannedRun]]:
    """Return the runs to measure, and those to replay before."""
    if args.num_warmups < 0:
        raise ConfigError(f"--num-warmups: expected 0 or more, got {args.num_warmups}")
    trace = load(args.dataset_path, args.num_prompts, args.seed)
    warmups = []
    if args.num_warmups:
        # The first runs of a longer trace are the same, so that the others are new to the caches.
        longer = load(args.dataset_path, len(trace.runs) + args.num_warmups, args.seed)
        more = longer.runs[len(trace.runs) :]
        warmups = [PlannedRun(run=replace(run, arrival_s=0.0)) for run in more]
    rate = None if args.self_timed else args.request_rate
    return with_arrivals(trace, rate, burstiness=args.burstiness, seed=args.seed), warmups


def _planned(args: argparse.Namespace, trace: Trace) -> tuple[list[PlannedRun], dict[str, Any]]:
    """Return the runs with what is promised, and what must be said of them."""
    for flag, value in (("--slo-s", args.slo_s), ("--slo-scale", args.slo_scale)):
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"{flag}: expected a number above 0, got {value}")
    if args.slo_scale is not None and not args.fleet:
        raise ConfigError("--slo-scale: expected --fleet, which the least duration of a run is on")
    fleet = fleet_of(args.fleet, model_shape=args.model_shape) if args.fleet else ()
    planned = [_promised(args, run, fleet) for run in trace.runs]
    reference = f"the least duration on {args.fleet}" if args.fleet else "the SLO"
    conditions = {
        "trace": trace.source,
        "trace_notes": list(trace.notes),
        "num_duplicate_runs": trace.num_duplicates,
        "seed": args.seed,
        "slo_s": args.slo_s,
        "slo_scale": args.slo_scale,
        "slo_reference": None if planned[0].reference_s is None else reference,
    }
    return planned, conditions


def _promised(
    args: argparse.Namespace, run: TraceRun, fleet: tuple[SimInstance, ...]
) -> PlannedRun:
    reference_s = critical_path_s(run, fleet) if fleet else None
    if args.slo_s is not None:
        run = replace(run, slo_s=args.slo_s)
    elif args.slo_scale is not None and reference_s is not None:
        run = replace(run, slo_s=args.slo_scale * reference_s)
    return PlannedRun(run=run, reference_s=run.slo_s if reference_s is None else reference_s)


def _check_outputs(args: argparse.Namespace) -> None:
    """Find out now, not after the load, that a result could not be written."""
    folders = {"--result-dir": args.result_dir, "--html": args.html and args.html.parent}
    for flag, folder in folders.items():
        try:
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise ConfigError(f"{flag}: cannot make the folder {folder}: {because(e)}") from None


def _pairs(pairs: list[str], flag: str) -> dict[str, str]:
    found = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not key.strip() or not equals:
            raise ConfigError(f"{flag}: expected KEY=VALUE, got {pair!r}")
        found[key.strip()] = value.strip()
    return found


def _extra_body(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as e:
        raise ConfigError(f"--extra-body: expected JSON, got {text!r}: {e}") from e
    if not isinstance(value, dict) or not isinstance(value.get("vllm_xargs", {}), dict):
        raise ConfigError(f"--extra-body: expected a JSON object, got {text!r}")
    return value


def _metrics(text: str) -> tuple[str, ...]:
    names = tuple(name for name in text.split(",") if name)
    if unknown := [name for name in names if name not in METRICS]:
        raise ConfigError(f"--percentile-metrics: expected {list(METRICS)}, got {unknown[0]!r}")
    return names


def _percentiles(text: str) -> tuple[float, ...]:
    try:
        values = tuple(float(value) for value in text.split(",") if value)
    except ValueError:
        values = (math.nan,)
    if any(not 0 <= value <= 100 for value in values):
        raise ConfigError(f"--metric-percentiles: expected numbers from 0 to 100, got {text!r}")
    return values


def _flags(args: argparse.Namespace) -> dict[str, Any]:
    """Return the flags as given, without what may be secret."""
    flags = {k: v for k, v in vars(args).items() if k not in {"run", "kind", "command"}}
    for name in _SECRET_FLAGS:
        flags[name] = [pair.partition("=")[0] + "=…" for pair in flags[name]]
    return {k: str(v) if isinstance(v, Path) else v for k, v in flags.items()}


def _filename(args: argparse.Namespace, model: str) -> str:
    rate = "trace-" if args.self_timed else f"{args.request_rate}qps-"
    limit = f"concurrency{args.max_concurrency}-" if args.max_concurrency else ""
    name = model.rstrip("/").rpartition("/")[2]
    now = datetime.now(UTC).astimezone().strftime("%Y%m%d-%H%M%S")
    return f"{args.label or args.backend}-{rate}{limit}{name}-{now}.json"
