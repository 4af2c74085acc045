"""Where the router spends its time: shares by part, and a flame graph.

python benchmarks/router_profile.py --svg docs/overhead.svg

The router of the sources stands before servers that answer at once, with 32 calls side by side, and
`py-spy` looks at it many times a second. A sample counts for the innermost part that it was in.
"""

import argparse
import asyncio
import json
import sys
import tempfile
from collections import Counter
from contextlib import AsyncExitStack
from pathlib import Path

import aiohttp
import psutil
from http_load import Load
from http_processes import started_router, started_servers

from vllm_workflow.core.errors import UpstreamError

SENDING = "sending, to the instance and to the client: system calls, and who is woken by them"
CORE = "core: prediction, policy, ledger, learning"
READING = "reading the call: JSON, its run, the head of its prompt"
COURSE = "the course of a call: runs, waiting, reservation, watching"
FORWARDING = "forwarding: spliced body, headers, tokens counted in the answer"
CLIENTS = "the client's side: the request, the answer"
INSTANCES = "the instance's side: connections, the request, its answer"
SERIES = "Prometheus series"
BOARD = "dashboard"
LOOP = "event loop: polling, receiving, tasks"
OTHER = "other"
_ROUTER: dict[str, str] = {
    **dict.fromkeys(("body", "wire", "dialects", "prefixes", "spelling", "auth", "once"), READING),
    **dict.fromkeys(("proxy", "runs", "binder", "tries", "attempt", "watch", "limits"), COURSE),
    **dict.fromkeys(("forward", "call", "usage", "answer", "upstream", "upstreams"), FORWARDING),
    **dict.fromkeys(("plain", "plain_connection", "head", "headers", "exchange"), CLIENTS),
    **dict.fromkeys(("connection", "pool"), INSTANCES),
    **dict.fromkeys(("metrics", "series"), SERIES),
    "board": BOARD,
}
_RATE = 400


def main() -> int:
    flags = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    flags.add_argument("--seconds", type=int, default=12, help="of samples (%(default)s)")
    flags.add_argument("--policy", default="workflow", help="(%(default)s)")
    flags.add_argument("--svg", type=Path, metavar="FILE", help="flame graph, of as long again")
    flags.add_argument("--json", type=Path, metavar="FILE")
    args = flags.parse_args()
    shares = asyncio.run(_profile(args))
    print("| part | share, % |\n|---|---|")
    for part, share in shares.items():
        print(f"| {part} | {100.0 * share:.0f} |")
    if args.json:
        document = {"command": sys.argv, "shares": shares}
        args.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 0


async def _profile(args: argparse.Namespace) -> dict[str, float]:
    """Return the share of each part, the largest first."""
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        urls = await started_servers(stack, 2, folder)
        session = await stack.enter_async_context(
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
        )
        router = await started_router(stack, args.policy, urls, folder)
        load = Load(session, router.url, router.pid, "headers")
        await load.closed(500, 8)  # connections and caches
        children = psutil.Process(router.pid).children(recursive=True)
        pid = children[0].pid if children else router.pid
        raw = folder / "samples"
        await _under_load(load, pid, args.seconds, raw, "raw")
        if args.svg:
            await _under_load(load, pid, args.seconds, args.svg, "flamegraph")
        return _shares(raw.read_text(encoding="utf-8"))


async def _under_load(load: Load, pid: int, seconds: int, out: Path, form: str) -> None:
    command = ["py-spy", "record", "--pid", str(pid), "--rate", str(_RATE), "--format", form]
    command += ["--duration", str(seconds), "--output", str(out)]
    watching = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    ended = asyncio.ensure_future(watching.communicate())
    while not ended.done():
        await load.closed(300, 32)
    said, _ = await ended
    if watching.returncode:
        raise UpstreamError(f"py-spy: {said.decode(errors='replace')[-300:]}")


def _shares(samples: str) -> dict[str, float]:
    """Shares of the samples, given as lines of frames from the outermost on and a number."""
    counts: Counter[str] = Counter()
    for line in samples.splitlines():
        frames, _, number = line.rpartition(" ")
        parts = (_part(frame) for frame in reversed(frames.split(";")))
        counts[next((part for part in parts if part), OTHER)] += int(number)
    total = sum(counts.values())
    return {part: number / total for part, number in counts.most_common()}


def _part(frame: str) -> str:
    """Return what a frame, `function (file:line)`, is a part of; empty for a helper of others."""
    qualified, _, where = frame.partition(" (")
    function = qualified.rpartition(".")[2]
    name = Path(where.partition(":")[0]).stem
    if function in {"send", "write"} and name in {"connection", "plain_connection"}:
        return SENDING
    if "/core/" in where:
        return CORE
    if "/router/" in where:
        return _ROUTER.get(name, OTHER)
    return LOOP if name in {"runners", "base_events", "main"} else ""


if __name__ == "__main__":
    sys.exit(main())
