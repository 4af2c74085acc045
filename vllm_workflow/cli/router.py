"""`vllm-workflow router`."""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import signal
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from vllm_workflow.core.config import PRESETS
from vllm_workflow.core.errors import ConfigError
from vllm_workflow.core.policy_names import name_of
from vllm_workflow.router.app import Router, serve
from vllm_workflow.router.config import RouterConfig
from vllm_workflow.router.logs import configure

_KEPT_DESCRIPTORS = 48
"""For what is no call: probes, files, the operators' port."""
_FEW_CONNECTIONS = 1000
"""Fewer are told of even if nobody has said how many there are to be."""
_GC_THRESHOLDS = 20_000, 20, 20
"""Python's own 700 has it search a busy router for cycles many times a second. Without any
collection a call took a tenth less CPU; this gets a good part of that, see docs/overhead.md."""


def add_parser(commands: Any) -> None:
    """Add the sub-command to what `ArgumentParser.add_subparsers` returned."""
    fields = RouterConfig.model_fields
    parser: argparse.ArgumentParser = commands.add_parser(
        "router",
        help="dispatch OpenAI-compatible calls over several vLLM servers",
        description="Dispatch OpenAI-compatible calls over several vLLM servers.",
    )
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="router.yaml; flags below replace its fields"
    )
    parser.add_argument(
        "--instance",
        action="append",
        metavar="URL",
        help="root of a vLLM server, e.g. http://10.0.0.7:8000; once for each",
    )
    parser.add_argument("--host", help=f"address to listen on (default: {fields['host'].default})")
    parser.add_argument(
        "--port",
        type=int,
        help=f"port to listen on, 0 takes a free one (default: {fields['port'].default})",
    )
    parser.add_argument(
        "--policy",
        metavar="POLICY",
        help=f"one of {', '.join(sorted(PRESETS))}, or DISPATCH+ORDERING as "
        "`vllm-workflow policies` lists them, or the path of a policy.json "
        f"(default: {fields['policy'].default})",
    )
    parser.add_argument(
        "--decision-log",
        metavar="FILE",
        help="append every decision to this file as JSON lines (default: none)",
    )
    parser.add_argument(
        "--log-level",
        choices=("debug", "info", "warning", "error"),
        help=f"what to log on stderr (default: {fields['log_level'].default})",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serve until SIGINT or SIGTERM; return the exit status."""
    hangups = _Hangups()
    max_files = _allow_many_files()
    config = _bounded(read_config(args), max_files)
    configure(config.log_level, config.log_format, log_calls=config.log_calls)
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        read = partial(_read_again, args, max_files) if args.config else None
        runner.run(_serve(config, read, hangups))
    return 0


def read_config(args: argparse.Namespace) -> RouterConfig:
    """Return the configuration that file and flags give together.

    Raises:
        ConfigError: A field is missing, unknown or out of range.
    """
    names = ("host", "port", "policy", "decision_log", "log_level")
    overrides = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.instance:
        overrides["instances"] = [{"url": url} for url in args.instance]
    if not args.config and not args.instance:
        raise ConfigError(
            "command line: instances: expected at least one: --instance URL, or --config FILE with "
            "`instances` or `discovery`; got neither"
        )
    if args.config:
        return RouterConfig.from_file(args.config, overrides)
    return RouterConfig.from_mapping(overrides, source="command line")


class _Hangups:
    """Keeps SIGHUP from ending a router that starts; what it asked for is done afterwards."""

    def __init__(self) -> None:
        self.came = False
        if hasattr(signal, "SIGHUP"):  # not on Windows
            signal.signal(signal.SIGHUP, self._note)

    def _note(self, *_: object) -> None:
        self.came = True

    def lead_to(self, loop: asyncio.AbstractEventLoop, reload: Callable[[], object]) -> None:
        """Have each one reload from now on, and those before, too."""
        if hasattr(signal, "SIGHUP"):
            loop.add_signal_handler(signal.SIGHUP, reload)
        if self.came:
            reload()


async def _serve(
    config: RouterConfig, read: Callable[[], RouterConfig] | None, hangups: _Hangups
) -> None:
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopping.set)
    async with serve(config, read) as router, asyncio.TaskGroup() as tasks:
        gc.freeze()  # what is there now stays
        gc.set_threshold(*_GC_THRESHOLDS)
        hangups.lead_to(loop, lambda: tasks.create_task(_reload(router)))
        policy = router.dispatcher.config
        print(
            f"router ready on {router.url}: {len(config.instances)} instances, "
            f"policy {name_of(policy)} {policy.fingerprint}"
            + (f", operators on {router.admin_url}" if router.admin_url else ""),
            flush=True,
        )
        await stopping.wait()
        stopping.clear()
        with suppress(TimeoutError):  # whoever says so twice is in a hurry
            async with asyncio.timeout(router.leave()):
                await stopping.wait()


async def _reload(router: Router) -> None:
    """Read the file again; one that cannot be used changes nothing."""
    try:
        await router.reload()
    except ConfigError as e:
        logging.getLogger(__name__).error("reload: %s", e)
    except Exception:  # nothing in a file may end a router that runs
        logging.getLogger(__name__).exception("reload: failed")


def _allow_many_files() -> int | None:
    """Return how many files may be open at a time; None if nobody says so.

    Each call takes two; the usual soft limit of 1,024 is there for programs using select().
    """
    try:
        import resource
    except ModuleNotFoundError:  # not on Windows
        return None
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError) as e:  # an "unlimited" that the system does not mean
        logging.getLogger(__name__).warning("cannot raise the limit of open files: %s", e)
        hard = soft
    return None if hard == resource.RLIM_INFINITY else hard


def _read_again(args: argparse.Namespace, max_files: int | None) -> RouterConfig:
    return _bounded(read_config(args), max_files)


def _bounded(config: RouterConfig, max_files: int | None) -> RouterConfig:
    """Take no more connections than can be forwarded: clients that hold every file descriptor
    would keep the router from reaching any instance, and so from serving any of them."""
    if max_files is None:
        return config
    most = max(1, (max_files - _KEPT_DESCRIPTORS) // 2)
    if config.limits.max_connections <= most:
        return config
    is_asked_for = "max_connections" in config.limits.model_fields_set
    logging.getLogger(__name__).log(
        logging.WARNING if is_asked_for or most < _FEW_CONNECTIONS else logging.INFO,
        "limits.max_connections: %d wanted, %d taken: %d files may be open at a time (ulimit -n)",
        config.limits.max_connections,
        most,
        max_files,
    )
    limits = config.limits.model_copy(update={"max_connections": most})
    return config.model_copy(update={"limits": limits})


def _loop_factory() -> Any:
    try:
        import uvloop
    except ModuleNotFoundError:  # not on Windows
        return None
    return uvloop.new_event_loop
