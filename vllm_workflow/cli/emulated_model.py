"""`vllm-workflow emulated-model`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from vllm_workflow.core.errors import ConfigError, because
from vllm_workflow.emulation.model_dir import MAX_MODEL_LEN, write_model_dir
from vllm_workflow.profiles import catalogue


def add_parser(commands: Any) -> None:
    """Add the sub-command to what `ArgumentParser.add_subparsers` returned."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "emulated-model",
        help="write a model folder without weights, for `vllm serve --emulate-gpu`",
        description="Write a folder with the configuration of a model and a tokenizer of one token "
        "per byte, but no weights. `vllm serve DIR --emulate-gpu A100-80G --emulate-model-shape "
        "SHAPE` serves it.",
    )
    parser.add_argument("shape", metavar="SHAPE", help=", ".join(catalogue.shape_names()))
    parser.add_argument("dir", metavar="DIR", type=Path, help="made if it is not there")
    parser.add_argument(
        "--max-model-len",
        type=int,
        default=MAX_MODEL_LEN,
        metavar="N",
        help="longest context; a server's own --max-model-len can be less (default: %(default)s)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the folder; return the exit status."""
    shape = catalogue.shape(args.shape)
    try:
        write_model_dir(shape, args.dir, max_model_len=args.max_model_len)
    except OSError as e:
        raise ConfigError(f"DIR: cannot write a folder {str(args.dir)!r}: {because(e)}") from None
    print(args.dir)
    return 0
