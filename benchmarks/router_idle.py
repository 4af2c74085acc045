"""What a router costs while nobody calls: its probes of many instances, and what it reads of them.

python benchmarks/router_idle.py --instances 100 --rounds 5

The instances are sockets of one process on loopback, each with a `/metrics` as long as that of an
idle vLLM 0.32: 60 kB, 600 lines. CPU time is that of the router's process alone.
"""

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path
from typing import cast

import aiohttp
import uvloop
from http_load import Load
from http_processes import started, started_router
from tqdm import tqdm

from vllm_workflow.bench.system_fleet import free_ports
from vllm_workflow.core.errors import WorkflowError

_SETTLING_S = 5.0
_LABELS = '{engine="0",model_name="meta-llama/Llama-3.1-8B-Instruct"'
_METRICS = "".join(
    [
        *(f"vllm:num_requests_{which}{_LABELS}}} 0.0\n" for which in ("running", "waiting")),
        f"vllm:kv_cache_usage_perc{_LABELS}}} 0.0\n",
        'vllm:cache_config_info{block_size="16",engine="0",num_gpu_blocks="10000"} 1.0\n',
        *(f'vllm:request_{i % 20}_seconds_bucket{_LABELS},le="{i}"}} 0.0\n' for i in range(596)),
    ]
).encode()
_MODELS = json.dumps({"object": "list", "data": [{"id": "m", "object": "model"}]}).encode()
_BODIES = {b"/health": b"", b"/metrics": _METRICS, b"/v1/models": _MODELS}


class _Server(asyncio.Protocol):
    """Answers GETs, one after the other."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.WriteTransport", transport)

    def data_received(self, data: bytes) -> None:
        body = _BODIES[data.split(b" ", 2)[1]]
        head = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n\r\n"
        self._transport.write(head % len(body) + body)
        if b"connection: close" in data.lower():
            self._transport.close()


async def _serve(ports: list[int]) -> None:
    loop = asyncio.get_running_loop()
    servers = [await loop.create_server(_Server, "127.0.0.1", port) for port in ports]
    await asyncio.gather(*(server.serve_forever() for server in servers))


async def _measure(args: argparse.Namespace) -> list[float]:
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        ports = free_ports(args.instances)
        urls = [f"http://127.0.0.1:{port}" for port in ports]
        command = [sys.executable, __file__, "--serve", *map(str, ports)]
        await started(stack, "servers", command, urls[-1], folder)
        router = await started_router(stack, args.router, urls, folder)
        session = await stack.enter_async_context(aiohttp.ClientSession())
        load = Load(session, router.url, router.pid, "headers")
        await asyncio.sleep(_SETTLING_S)
        shares = []
        for _ in tqdm(range(args.rounds), disable=None):
            cpu_s = load.cpu_s()
            await asyncio.sleep(args.seconds)
            shares.append((load.cpu_s() - cpu_s) / args.seconds)
        async with session.get(f"{router.url}/health") as response:
            instances = (await response.json())["instances"]
        if (num_healthy := sum(instances.values())) != args.instances:
            raise WorkflowError(f"expected {args.instances} healthy instances, got {num_healthy}")
        return shares


def main() -> int:
    flags = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    flags.add_argument("--instances", type=int, default=100, help="to watch (%(default)s)")
    flags.add_argument("--rounds", type=int, default=5, help="of measuring (%(default)s)")
    flags.add_argument("--seconds", type=float, default=10.0, help="of each (%(default)s)")
    flags.add_argument(
        "--router", default="workflow", help="POLICY or POLICY@FOLDER, as router_overhead.py's"
    )
    flags.add_argument("--serve", type=int, nargs="+", help=argparse.SUPPRESS)
    args = flags.parse_args()
    uvloop.install()
    if args.serve:
        asyncio.run(_serve(args.serve))
    try:
        shares = asyncio.run(_measure(args))
    except WorkflowError as e:
        print(f"{flags.prog}: {e}", file=sys.stderr)
        return 1
    print(
        f"{args.instances} instances, no calls: {statistics.median(shares):.3f} cores, "
        f"{min(shares):.3f} to {max(shares):.3f} in {args.rounds} rounds of {args.seconds:g} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
