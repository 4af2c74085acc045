"""`vllm-workflow profile`."""

from __future__ import annotations

import argparse
import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vllm_workflow.core.errors import ConfigError
from vllm_workflow.core.fit import fit
from vllm_workflow.core.hardware import WEIGHT_BITS, Deployment
from vllm_workflow.core.latency import LatencyModel
from vllm_workflow.core.windows import decode_windows
from vllm_workflow.profiles import catalogue
from vllm_workflow.profiles.profile import LatencyProfile, latency_to_mapping
from vllm_workflow.profiling.plan import Limits
from vllm_workflow.profiling.prober import fitted_profile, measure
from vllm_workflow.profiling.tables import read_requests, read_steps

_LIMITS = Limits()
_BUDGET = LatencyModel().max_num_batched_tokens


def add_parser(commands: Any) -> None:
    """Add the sub-command to what `ArgumentParser.add_subparsers` returned."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "profile",
        help="measure a vLLM server and write its latency profile",
        description="Measure how long the steps of a vLLM server take, and write a profile that "
        "`profile:` of an instance in router.yaml reads. The server must be idle.",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--base-url", metavar="URL", help="root of a live vLLM server")
    source.add_argument(
        "--steps",
        type=Path,
        metavar="FILE",
        help="fit to step timings instead: CSV or .jsonl with step_ms, num_prefill_tokens, "
        "num_decode_seqs, num_kv_tokens and, if known, prefill_attention",
    )
    source.add_argument(
        "--requests",
        type=Path,
        metavar="FILE",
        help="fit to request timestamps instead: CSV or .jsonl with first_token_time, "
        "last_token_time, num_prompt_tokens, num_output_tokens of every request of one instance",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("profile.json"),
        metavar="FILE",
        help="where to write the profile (default: %(default)s)",
    )
    parser.add_argument(
        "--max-num-batched-tokens",
        type=int,
        default=_BUDGET,
        metavar="N",
        help="as the server was started with (default: %(default)s)",
    )
    _add_hardware(parser)
    _add_limits(parser)
    parser.set_defaults(run=run)


def _add_hardware(parser: argparse.ArgumentParser) -> None:
    hardware = parser.add_argument_group(
        "hardware", "what datasheets say of it holds where the measurements say little"
    )
    hardware.add_argument("--gpu", metavar="NAME", help=", ".join(catalogue.gpu_names()))
    hardware.add_argument("--model-shape", metavar="NAME", help=", ".join(catalogue.shape_names()))
    hardware.add_argument(
        "--tp", type=int, default=1, metavar="N", help="tensor-parallel size (default: 1)"
    )
    hardware.add_argument(
        "--weight-bits",
        type=int,
        choices=WEIGHT_BITS,
        default=16,
        help="bits of a weight (default: %(default)s)",
    )


def _add_limits(parser: argparse.ArgumentParser) -> None:
    load = parser.add_argument_group("load", "of a live server")
    load.add_argument("--model", default="", help="its name at the server (default: the first)")
    load.add_argument(
        "--max-prompt-tokens",
        type=int,
        default=_LIMITS.max_prompt_tokens,
        metavar="N",
        help="longest prompt sent (default: %(default)s)",
    )
    load.add_argument(
        "--max-num-seqs",
        type=int,
        default=_LIMITS.max_num_seqs,
        metavar="N",
        help="most requests at a time (default: %(default)s)",
    )
    load.add_argument(
        "--num-repeats",
        type=int,
        default=_LIMITS.num_repeats,
        metavar="N",
        help="how often each size is measured (default: %(default)s)",
    )
    load.add_argument(
        "--max-seconds",
        type=float,
        default=_LIMITS.max_seconds,
        metavar="S",
        help="after which nothing further is begun (default: %(default)s)",
    )
    load.add_argument("--seed", type=int, default=0, help="of the random prompts (default: 0)")
    load.add_argument("--disable-tqdm", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    """Measure or read, fit, write; return the exit status."""
    if not args.output.resolve().parent.is_dir():
        raise ConfigError(f"--output {args.output}: expected a file in an existing directory")
    if args.max_num_batched_tokens < 1:
        raise ConfigError(
            f"--max-num-batched-tokens: expected at least 1, got {args.max_num_batched_tokens}"
        )
    deployment = _deployment(args)
    profile = _measured(args, deployment) if args.base_url else _from_file(args, deployment)
    args.output.write_text(profile.to_json(), encoding="utf-8")
    numbers = ", ".join(f"{k} {v:g}" for k, v in latency_to_mapping(profile.latency).items())
    print(f"{numbers}\nresiduals: {profile.residuals}\nwrote {args.output}")
    return 0


def _deployment(args: argparse.Namespace) -> Deployment | None:
    if bool(args.gpu) != bool(args.model_shape):
        raise ConfigError("--gpu and --model-shape: expected both or none, got one")
    if not args.gpu:
        return None
    return catalogue.deployment(
        args.gpu, args.model_shape, tp=args.tp, weight_bits=args.weight_bits
    )


def _measured(args: argparse.Namespace, deployment: Deployment | None) -> LatencyProfile:
    limits = Limits(
        max_prompt_tokens=args.max_prompt_tokens,
        max_num_seqs=args.max_num_seqs,
        num_repeats=args.num_repeats,
        max_seconds=args.max_seconds,
    )
    with tqdm(unit="probe", disable=args.disable_tqdm) as bar:
        measuring = measure(
            args.base_url,
            model=args.model,
            limits=limits,
            seed=args.seed,
            on_plan=bar.reset,
            on_probe=bar.update,
        )
        facts, measured = asyncio.run(measuring)
    return fitted_profile(
        facts,
        measured,
        max_num_batched_tokens=args.max_num_batched_tokens,
        deployment=deployment,
    )


def _from_file(args: argparse.Namespace, deployment: Deployment | None) -> LatencyProfile:
    budget = args.max_num_batched_tokens
    prior = deployment.latency(max_num_batched_tokens=budget) if deployment else None
    path: Path = args.steps or args.requests
    if args.steps:
        observations = read_steps(path)
    else:
        observations = decode_windows(read_requests(path), max_num_batched_tokens=budget)
    fitted = fit(observations, prior, max_num_batched_tokens=budget)
    kind = "step timings" if args.steps else "request timestamps"
    base = catalogue.prior(deployment) if deployment else LatencyProfile(latency=fitted.latency)
    return replace(
        base,
        latency=fitted.latency,
        source=f"fitted to {kind} of {path.name}",
        residuals=fitted.residuals,
    )
