"""Entry points of vLLM: the `--emulate-…` flags, and the platform that they switch on.

Without `--emulate-gpu` both do nothing, and vLLM is as if this were not installed.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any

from vllm_workflow.core.errors import ConfigError
from vllm_workflow.emulation.settings import FLAGS, EmulationSettings

PLATFORM = "vllm_workflow.emulation.platform.EmulatedGpuPlatform"

# A child of vLLM's own logger: same handler, same format, same VLLM_LOGGING_LEVEL.
logger = logging.getLogger("vllm.workflow")


def platform() -> str | None:
    """Entry point of `vllm.platform_plugins`: the class to use, None for vLLM's own choice.

    Called in each process of a server, in the first one before the command line is parsed.
    """
    settings = EmulationSettings.from_environment() or EmulationSettings.from_argv(sys.argv[1:])
    if settings is None:
        return None
    settings.to_environment(os.environ)
    return PLATFORM


def register() -> None:
    """Entry point of `vllm.general_plugins`: add the flags. Never raises; may be called again."""
    arg_utils = sys.modules.get("vllm.engine.arg_utils")
    if arg_utils is None:
        return  # nobody parses a command line in this process
    try:
        _wrap_add_cli_args(arg_utils.EngineArgs)
    except Exception as e:  # a plug-in must not stop a server that does not use it
        logger.warning(
            "vllm-workflow cannot add --emulate-gpu to vLLM %s (%s: %s)",
            getattr(sys.modules.get("vllm"), "__version__", "of unknown version"),
            type(e).__name__,
            e,
        )


def _wrap_add_cli_args(engine_args: Any) -> None:
    stock = engine_args.add_cli_args
    if getattr(stock, "adds_emulation_flags", False):
        return

    def add_cli_args(parser: Any) -> Any:
        parser = stock(parser)
        if next(iter(FLAGS)) in parser._option_string_actions:
            return parser  # another wrapper lies between this one and an earlier one of its kind
        group = parser.add_argument_group(
            "emulated GPU", "A server without a GPU and without a model, for benchmarks and tests."
        )
        for flag, about in FLAGS.items():
            group.add_argument(flag, action=_Emulate, **about)
        return parser

    vars(add_cli_args).update(vars(stock))  # what other plug-ins noted there still holds
    add_cli_args.adds_emulation_flags = True  # type: ignore[attr-defined]
    engine_args.add_cli_args = staticmethod(add_cli_args)


class _Emulate(argparse.Action):
    """Checks a flag that `platform` has acted on already, before anything is started."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        from vllm.platforms import current_platform

        settings = EmulationSettings.from_environment()
        if settings is None and self.dest != "emulate_gpu":
            raise argparse.ArgumentError(self, "only together with --emulate-gpu")
        if settings is None or current_platform.device_name != "emulated_gpu":
            raise argparse.ArgumentError(
                self,
                "must be spelt out on the command line, not in a --config file; and neither "
                "VLLM_TARGET_DEVICE=cpu nor VLLM_PLUGINS may keep vLLM from loading the platform",
            )
        try:
            settings.check()
        except ConfigError as e:
            raise argparse.ArgumentError(self, str(e)) from None
        from vllm_workflow import vllm_metrics

        vllm_metrics.serve_from_this_process()
        setattr(namespace, self.dest, values)
