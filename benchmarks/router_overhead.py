"""What a router costs per request, beside other people's routers and a plain proxy.

python benchmarks/router_overhead.py --rounds 5 --json router_overhead.json

All stand before the same servers, which answer at once. Rounds alternate between routers, so that
what else the machine does falls on all of them. CPU time is that of the router's processes alone.
`POLICY@FOLDER` is this project's router under that policy, run from the package in that folder:
`workflow@out/compiled`, or `workflow@` and a work tree of another version.
"""

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path

import aiohttp
from http_load import PROMPT_BYTES, Load, prompt
from http_processes import BACKEND, started, started_router, started_servers
from tqdm import tqdm

from vllm_workflow.bench import peers
from vllm_workflow.bench.compare_flags import writable
from vllm_workflow.bench.compare_report import versions
from vllm_workflow.bench.system_fleet import free_ports
from vllm_workflow.cluster.process import ManagedProcess
from vllm_workflow.core.errors import ConfigError, WorkflowError
from vllm_workflow.core.latency import LatencyModel

OURS = ("workflow", "predicted-finish", "round-robin")
PEERS = ("vllm-router:round_robin", "vllm-router:program", "smg:least_load")
PLAIN = "plain aiohttp proxy"
DIRECT = "no router"
_NUM_SERVERS = 2


def main() -> int:
    flags = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    flags.add_argument("--rounds", type=int, default=5, help="of each router (%(default)s)")
    flags.add_argument("--requests", type=int, default=3000, help="per round (%(default)s)")
    flags.add_argument(
        "--prompt-bytes", type=int, default=PROMPT_BYTES, help="of each request (%(default)s)"
    )
    flags.add_argument("--routers", nargs="+", default=[*OURS, *PEERS, PLAIN, DIRECT])
    flags.add_argument("--peers-dir", type=Path, default=Path(".cache/peers"))
    flags.add_argument("--json", type=Path, metavar="FILE")
    args = flags.parse_args()
    try:
        writable(args.json)
        rows = asyncio.run(_measure(args))
    except ConfigError as e:
        flags.error(str(e))
    except WorkflowError as e:
        print(f"{flags.prog}: {e}", file=sys.stderr)
        return 1
    print(_table(rows))
    if args.json:
        document = {"command": sys.argv, "versions": versions(), "rows": rows}
        args.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 0


async def _measure(args: argparse.Namespace) -> list[dict[str, object]]:
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        urls = await started_servers(stack, _NUM_SERVERS, folder)
        session = await stack.enter_async_context(
            aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=120)
            )
        )
        loads: dict[str, Load] = {}
        text = prompt(args.prompt_bytes)
        for name in args.routers:
            if name == DIRECT:
                loads[name] = Load(session, urls[0], os.getpid(), "headers", text)
                continue
            process = await _router(stack, name, urls, args.peers_dir, folder)
            identity = "session" if name in peers.PEERS else "headers"
            loads[name] = Load(session, process.url, process.pid, identity, text)
        return await _rounds(args, loads)


async def _router(
    stack: AsyncExitStack, name: str, urls: list[str], peers_dir: Path, folder: Path
) -> ManagedProcess:
    if name not in peers.PEERS and name != PLAIN:
        return await started_router(stack, name, urls, folder)
    port, metrics_port = free_ports(2)
    if name == PLAIN:
        command = [sys.executable, BACKEND, "proxy", str(port), *urls]
    else:
        wanted = peers.peer(name)
        latencies = [LatencyModel()] * len(urls)
        front = peers.Front(urls=urls, latencies=latencies, port=port, metrics_port=metrics_port)
        command = peers.command(wanted, peers.installed(wanted, peers_dir), front)
    return await started(stack, name, command, f"http://127.0.0.1:{port}", folder)


async def _rounds(args: argparse.Namespace, loads: dict[str, Load]) -> list[dict[str, object]]:
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in loads}
    for load in loads.values():
        await load.closed(200, 8)  # connections and caches
    for number in tqdm(range(args.rounds * len(loads)), unit="round"):
        name = list(loads)[number % len(loads)]
        samples[name].append(await _round(loads[name], args.requests))
    return [_row(name, samples[name]) for name in loads]


async def _round(load: Load, num_requests: int) -> dict[str, float]:
    alone = await load.closed(num_requests // 10, 1)
    many = await load.closed(num_requests, 32)
    streams = await load.closed(num_requests // 4, 32, num_chunks=16)
    paced = await load.paced(128, 50, 30.0)
    return {
        "p50_ms_c1": alone.p50_ms,
        "cpu_us_c32": many.cpu_us,
        "cpu_us_stream_c32": streams.cpu_us,
        "cores_128_streams": paced.cores,
        "rss_mb": load.rss_mb(),
    }


def _row(name: str, samples: list[dict[str, float]]) -> dict[str, object]:
    """Median, least and most over the rounds."""
    row: dict[str, object] = {"router": name, "rounds": len(samples)}
    for key in samples[0]:
        values = [sample[key] for sample in samples]
        has_router = name != DIRECT or key == "p50_ms_c1"
        row[key] = [statistics.median(values), min(values), max(values)] if has_router else None
    return row


def _table(rows: list[dict[str, object]]) -> str:
    columns = {
        "p50_ms_c1": ("p50 at c=1, ms", ".2f"),
        "cpu_us_c32": ("CPU per request, µs", ".0f"),
        "cpu_us_stream_c32": ("per stream of 16 chunks, µs", ".0f"),
        "cores_128_streams": ("128 paced streams, cores", ".2f"),
        "rss_mb": ("memory, MB", ".0f"),
    }
    lines = [
        "| router | " + " | ".join(title for title, _ in columns.values()) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for row in rows:
        cells = []
        for key, (_, form) in columns.items():
            of_it = row[key]
            if not isinstance(of_it, list):
                cells.append("none")
                continue
            median, least, most = (format(value, form) for value in of_it)
            cells.append(f"{median} ({least}–{most})")
        lines.append(f"| {row['router']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
