"""The `vllm.general_plugins` entry point: adds `--scheduler` to `vllm serve`, activates nothing.

vLLM calls `register` in each of its processes. Only the one that parses a command line has
imported `vllm.engine.arg_utils` by then, and only there is anything to do.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any

from vllm_workflow.core.errors import ConfigError
from vllm_workflow.engine.policy import POLICY_ENV, policy_of_environment

WORKFLOW_SCHEDULER = "vllm_workflow.engine.scheduler.WorkflowScheduler"

# A child of vLLM's own logger: same handler, same format, same VLLM_LOGGING_LEVEL.
logger = logging.getLogger("vllm.workflow")

_HELP = """Which scheduler orders the requests of this engine. `workflow`: by the deadlines of the
workflows that requests belong to; requests without workflow metadata run as with vLLM's own.
`vllm`: vLLM's own. Or the dotted path of a scheduler class, as for --scheduler-cls."""


def register() -> None:
    """Teach the command line of this process the flag. Never raises; may be called again."""
    arg_utils = sys.modules.get("vllm.engine.arg_utils")
    if arg_utils is None:
        return
    try:
        _make_policy_variable_known()
        _wrap_add_cli_args(arg_utils.EngineArgs)
    except Exception as e:  # a plug-in must not stop a server that does not use it
        logger.warning(
            "vllm-workflow cannot add --scheduler to vLLM %s (%s: %s); use --scheduler-cls %s",
            getattr(sys.modules.get("vllm"), "__version__", "of unknown version"),
            type(e).__name__,
            e,
            WORKFLOW_SCHEDULER,
        )


def _wrap_add_cli_args(engine_args: Any) -> None:
    stock = engine_args.add_cli_args
    if getattr(stock, "adds_scheduler_flag", False):
        return

    def add_cli_args(parser: Any) -> Any:
        parser = stock(parser)
        try:
            parser.add_argument(
                "--scheduler",
                dest="scheduler_cls",
                action=_ChooseScheduler,
                metavar="{workflow,vllm,DOTTED.PATH}",
                help=_HELP,
            )
        except argparse.ArgumentError:
            logger.warning("vLLM has a --scheduler flag of its own; vllm-workflow leaves it alone")
        return parser

    add_cli_args.adds_scheduler_flag = True  # type: ignore[attr-defined]
    engine_args.add_cli_args = staticmethod(add_cli_args)


def _make_policy_variable_known() -> None:
    """Spare the user vLLM's warning about (or refusal of) variables that it does not know."""
    if POLICY_ENV in os.environ:
        from vllm import envs

        envs.environment_variables.setdefault(POLICY_ENV, lambda: os.environ.get(POLICY_ENV))


class _ChooseScheduler(argparse.Action):
    """Resolves a scheduler's name, and refuses a bad policy before anything is started."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        name = str(values)
        if name == "workflow":
            name = WORKFLOW_SCHEDULER
        if name == "vllm":
            setattr(namespace, self.dest, None)
            return
        if "." not in name:
            raise argparse.ArgumentError(
                self, f"unknown scheduler {name!r}; choose workflow, vllm or a dotted path"
            )
        if name == WORKFLOW_SCHEDULER:
            try:
                policy_of_environment()
            except ConfigError as e:
                raise argparse.ArgumentError(self, str(e)) from None
            self._serve_metrics()
        setattr(namespace, self.dest, name)

    def _serve_metrics(self) -> None:
        from vllm_workflow import vllm_metrics

        try:
            vllm_metrics.serve_from_this_process()
        except Exception as e:
            logger.warning("vllm-workflow metrics are off: %s: %s", type(e).__name__, e)
