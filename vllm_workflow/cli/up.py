"""`vllm-workflow up`."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from vllm_workflow.cluster.config import DEFAULT_COMMAND, ClusterConfig
from vllm_workflow.cluster.process import ProcessError
from vllm_workflow.cluster.supervisor import Cluster

_DESCRIPTION = f"""\
Starts the instances and the router that cluster.yaml names, as processes of this machine, and
ends them on Ctrl-C or SIGTERM, when one of them cannot start, and when this command is killed.
Each instance is `{DEFAULT_COMMAND}` unless told otherwise.
An instance that dies later is reported and not restarted; the router goes on with the others."""


def add_parser(commands: Any) -> None:
    """Add the sub-command to what `ArgumentParser.add_subparsers` returned."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "up",
        help="start the instances and the router of one machine",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "config", type=Path, metavar="cluster.yaml", help="what to start; flags replace its fields"
    )
    parser.add_argument(
        "--log-dir",
        type=Path,
        metavar="DIR",
        help="one log per process goes here (default: that of the file, else logs beside it)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the cluster until told to stop; return 0 then, 1 if it ended by itself."""
    overrides = {"log_dir": args.log_dir.resolve()} if args.log_dir else {}
    config = ClusterConfig.from_file(args.config, overrides)
    return asyncio.run(_up(config))


async def _up(config: ClusterConfig) -> int:
    body = asyncio.current_task()
    assert body is not None
    told: list[int] = []

    def stop(number: int) -> None:
        if not told:
            body.cancel()
        told.append(number)

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup leaves SIGHUP
            loop.add_signal_handler(number, stop, number)
    try:
        await _run(config)
    except asyncio.CancelledError:
        if not told:
            raise
        print(f"stopped by {signal.Signals(told[0]).name}", file=sys.stderr)
        return 0
    except ProcessError as e:
        print(f"vllm-workflow: {e}", file=sys.stderr)
    return 1


async def _run(config: ClusterConfig) -> None:
    cluster = Cluster(config, report=_say)
    async with AsyncExitStack() as stack:
        async with _progress(cluster):
            await stack.enter_async_context(cluster)
        print(f"ready: OpenAI-compatible API on {cluster.router_url}/v1", flush=True)
        await cluster.wait()


@asynccontextmanager
async def _progress(cluster: Cluster) -> AsyncIterator[None]:
    """Show a bar of the processes that are ready while the block runs, on a terminal only."""
    if not sys.stderr.isatty():
        yield
        return
    from tqdm import tqdm

    total = 1 + len(cluster.config.instances)
    with tqdm(total=total, unit="process", desc="starting", leave=False) as bar:

        async def redraw() -> None:
            while True:
                bar.n = sum(p.is_ready for p in cluster.processes)
                loading = [p.name for p in cluster.processes if p.is_loading]
                bar.set_postfix_str(f"loading {', '.join(sorted(loading))}" if loading else "")
                await asyncio.sleep(0.5)

        task = asyncio.create_task(redraw())
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


def _say(line: str) -> None:
    """Print one line above a bar, if there is one."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        tqdm.write(line, file=sys.stderr)
    else:
        print(line, file=sys.stderr, flush=True)
