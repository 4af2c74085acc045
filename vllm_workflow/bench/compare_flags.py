"""The command line of a comparison."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn, TypeVar

from vllm_workflow.bench.compare import DEFAULT_AGAINST, Options
from vllm_workflow.bench.compare_jobs import Setup
from vllm_workflow.bench.disturbance import parse as parse_disturbance
from vllm_workflow.bench.peers import GROUP, PEERS
from vllm_workflow.bench.system import SystemOptions
from vllm_workflow.core import policy_names
from vllm_workflow.core.errors import ConfigError
from vllm_workflow.sim.workloads import builtin_names

_T = TypeVar("_T")
_DEFAULTS = Options()


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Say what is wrong in one line, and exit with status 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def parser() -> argparse.ArgumentParser:
    """Return the parser; `options` turns what it returns into values."""
    made = _Parser(
        description="Compare policies on the same runs and arrivals, by simulation. Prints a "
        "table per trace and rate; flags that take several values may also be repeated.",
    )
    _add_what(made)
    _add_load(made)
    _add_how(made)
    _add_system(made)
    return made


def options(args: argparse.Namespace) -> Options:
    """Raises: ConfigError: Flags that contradict each other."""
    if args.rates and args.loads:
        raise ConfigError("--loads: expected either --rates or --loads, got both")
    if args.slo_s is not None and args.slo_scales:
        raise ConfigError("--slo-s: expected either --slo-scales or --slo-s, got both")
    setup = Setup(
        fleet=args.fleet,
        model_shape=args.model_shape,
        weight_bits=args.weight_bits,
        tp=args.tp,
        gpu_memory_utilization=args.gpu_memory_utilization,
        num_runs=args.runs,
        burstiness=args.burstiness,
        disturbance=parse_disturbance(args.disturb),
    )
    if args.level == 3 and args.disturb != "none":
        raise ConfigError(f"--disturb: expected none at level 3, got {args.disturb!r}")
    return Options(
        traces=_several(args.trace, _DEFAULTS.traces),
        setup=setup,
        rates=_several(args.rates, ()),
        loads=_several(args.loads, _DEFAULTS.loads),
        slo_scales=_several(args.slo_scales, _DEFAULTS.slo_scales),
        slo_s=args.slo_s,
        policies=_several(args.policies, _DEFAULTS.policies),
        against=args.against,
        num_seeds=args.seeds,
        level=args.level,
        num_jobs=args.jobs,
    )


def system_options(args: argparse.Namespace) -> SystemOptions:
    """Return how level 3 is run."""
    return SystemOptions(time_scale=args.time_scale, workdir=args.workdir, peers=args.peers_dir)


def writable(*paths: Path | None) -> None:
    """Make the directories of what will be written, before hours are spent on it.

    Raises:
        ConfigError: A file could not be written there.
    """
    for path in paths:
        if path is None:
            continue
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8"):
                pass
        except OSError as e:
            raise ConfigError(f"{path}: cannot write: {e.strerror}") from None


def _add_what(made: argparse.ArgumentParser) -> None:
    setup = _DEFAULTS.setup
    made.add_argument(
        "--trace",
        nargs="+",
        action="extend",
        metavar="TRACE",
        help="runs: a file (this project's JSONL, Hexgen JSON, Mooncake JSONL, a router's decision "
        f"log) or one of {', '.join(builtin_names())} (default: {_shown(_DEFAULTS.traces)})",
    )
    made.add_argument(
        "--fleet",
        default=setup.fleet,
        help="instances: GPU:COUNT,… or a YAML file (default: %(default)s)",
    )
    made.add_argument(
        "--model-shape",
        default=setup.model_shape,
        help="model that every instance serves (default: %(default)s)",
    )
    made.add_argument(
        "--weight-bits",
        type=int,
        choices=(4, 8, 16),
        default=setup.weight_bits,
        help="of its weights (default: %(default)s)",
    )
    made.add_argument(
        "--tp", type=_count, default=setup.tp, help="GPUs per instance (default: %(default)s)"
    )
    made.add_argument(
        "--gpu-memory-utilization",
        type=_positive,
        default=setup.gpu_memory_utilization,
        help="share of each GPU's memory that vLLM may use, above 0 and at most 1; with vLLM's own "
        "default, 0.9, an L40S with a 70B model at 4 bits could not hold one CHESS prompt "
        "(default: %(default)s)",
    )
    made.add_argument(
        "--policies",
        nargs="+",
        action="extend",
        metavar="POLICY",
        help="DISPATCH+ORDERING, a preset, a policy.json, `all`, `baselines`, or a search in "
        f"hindsight: {', '.join(policy_names.SEARCH)}; see `vllm-workflow policies`. "
        f"At level 3 no searches, but `{GROUP}` or some of {', '.join(PEERS)}, before stock vLLM "
        f"(default: {_shown(_DEFAULTS.policies)})",
    )
    made.add_argument(
        "--against",
        metavar="POLICY",
        help="policy that the others are held against, one of --policies (default: "
        f"{DEFAULT_AGAINST}, and the baseline that does best in each setting)",
    )


def _add_load(made: argparse.ArgumentParser) -> None:
    made.add_argument(
        "--rates",
        type=_positive,
        nargs="+",
        action="extend",
        metavar="RATE",
        help="arrivals of runs per second",
    )
    made.add_argument(
        "--loads",
        type=_positive,
        nargs="+",
        action="extend",
        metavar="LOAD",
        help="arrivals as fractions of what the fleet serves at most, which is found first: the "
        f"highest throughput of two simple policies (default: {_shown(_DEFAULTS.loads)})",
    )
    made.add_argument(
        "--slo-scales",
        type=_positive,
        nargs="+",
        action="extend",
        metavar="SCALE",
        help="promise to each run, as multiples of its critical path alone on the fastest instance "
        f"(default: {_shown(_DEFAULTS.slo_scales)})",
    )
    made.add_argument(
        "--slo-s", type=_positive, metavar="SECONDS", help="the same promise to every run instead"
    )
    made.add_argument(
        "--runs",
        type=_count,
        default=_DEFAULTS.setup.num_runs,
        help="runs that arrive in each simulation; a file with fewer is resampled "
        "(default: %(default)s)",
    )
    made.add_argument(
        "--burstiness",
        type=_burstiness,
        default=_DEFAULTS.setup.burstiness,
        help="as in `vllm bench serve`: 1 is a Poisson process, less comes in bursts, more is more "
        "regular, inf is even (default: %(default)s)",
    )

    made.add_argument(
        "--disturb",
        default="none",
        metavar="WHAT",
        help="what the router is wrong about: `cold` (no workflow is declared), `lengths:0.6` "
        "(clients announce each call's tokens 60%% too high or too low), `profiles:0.6` (so is all "
        "that is declared of a stage), `slow:a100-0:2` (that instance takes twice as long as it is "
        "believed to); levels 1 and 2 (default: %(default)s)",
    )


def _add_how(made: argparse.ArgumentParser) -> None:
    made.add_argument(
        "--seeds",
        type=_count,
        default=_DEFAULTS.num_seeds,
        help="how often everything is repeated with other runs and arrivals (default: %(default)s)",
    )
    made.add_argument(
        "--level",
        type=int,
        choices=(1, 2, 3),
        default=_DEFAULTS.level,
        help="1: engines in closed form; 2: vLLM's own scheduler in virtual time, and the error of "
        "level 1 against it; 3: real servers with an emulated GPU (default: %(default)s)",
    )
    made.add_argument(
        "--jobs",
        type=_count,
        default=os.cpu_count() or 1,
        help="processes; the results do not depend on it (default: number of CPUs)",
    )
    made.add_argument("--json", type=Path, metavar="FILE", help="write rows, pairs and conditions")
    made.add_argument("--html", type=Path, metavar="FILE", help="write a report with charts")


def _add_system(made: argparse.ArgumentParser) -> None:
    default = SystemOptions()
    group = made.add_argument_group("level 3")
    group.add_argument(
        "--time-scale",
        type=_positive,
        default=default.time_scale,
        metavar="X",
        help="run X times as fast as life; the report says whether this machine kept up "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--workdir",
        type=Path,
        default=default.workdir,
        metavar="DIR",
        help="for model folders, configurations and logs of servers and routers "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--peers-dir",
        type=Path,
        default=default.peers,
        metavar="DIR",
        help="where peers are, or get installed from PyPI (default: %(default)s)",
    )


def _shown(values: Sequence[object]) -> str:
    return " ".join(str(value) for value in values)


def _several(given: list[_T] | None, default: tuple[_T, ...]) -> tuple[_T, ...]:
    return tuple(dict.fromkeys(given)) if given else default


def _number(text: str, holds: Callable[[float], bool], wanted: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not holds(value):
        raise argparse.ArgumentTypeError(f"expected {wanted}, got {text!r}")
    return value


def _positive(text: str) -> float:
    return _number(text, lambda value: 0.0 < value < math.inf, "a finite number above 0")


def _burstiness(text: str) -> float:
    return _number(text, lambda value: value > 0.0, "a number above 0")


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"expected an integer from 1, got {text!r}")
    return int(text)
