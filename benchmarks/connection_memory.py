"""How much of the router's memory a connection takes that has sent only part of something.

python benchmarks/connection_memory.py --connections 500

Each row has a router of its own, in a process of its own. "counted" is what stands against
`limits.max_bodies_mb`; what is left is bounded by the number of connections alone. "open" is how
many the router has not cut off.
"""

import argparse
import asyncio
import gc
import os
import random
import socket
import sys
import zlib
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import uvloop

from vllm_workflow.router.app import Router, serve
from vllm_workflow.router.config import RouterConfig

CALL = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n"
BODY = b'{"model":"m"}'
WHOLE = CALL + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
CHUNKED = CALL + b"Transfer-Encoding: chunked\r\n\r\n"
WHOLE_CHUNKED = CHUNKED + b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)


def headers(number: int, size: int) -> bytes:
    return b"".join(b"X-%d: %b\r\n" % (n, b"a" * size) for n in range(number))


def compressed(num_bytes: int) -> bytes:
    data = zlib.compressobj(9, zlib.DEFLATED, 31)
    return data.compress(random.Random(0).randbytes(num_bytes)) + data.flush(zlib.Z_SYNC_FLUSH)


SENT: dict[str, tuple[bytes, ...]] = {
    "nothing": (),
    "a part of the request line": (CALL[:20],),
    "60 kB of headers": (CALL, headers(122, 480)),
    "1 MB of headers": (CALL, headers(120, 8000)),
    "1 kB of a body with a length": (CALL + b"Content-Length: 999999\r\n\r\n" + b" " * 1000,),
    "1 kB of a chunked body": (CHUNKED + b"%x\r\n" % 999_999 + b" " * 1000,),
    "400 kB of a chunked body": (CHUNKED + b"%x\r\n" % 999_999 + b" " * 400_000,),
    "100 kB of a body in gzip": (
        CALL + b"Content-Encoding: gzip\r\nContent-Length: 999999\r\n\r\n" + compressed(100_000),
    ),
    "a call": (WHOLE,),
    "a call, and 60 kB of the next": (
        WHOLE,
        CALL + b"Content-Length: 999999\r\n\r\n" + b" " * 60_000,
    ),
    "a call by aiohttp": (WHOLE_CHUNKED,),
    "a call by aiohttp, and 60 kB of the next": (
        WHOLE_CHUNKED,
        CALL + b"Content-Length: 999999\r\n\r\n" + b" " * 60_000,
    ),
    "a call by aiohttp, and 60 kB of headers": (WHOLE_CHUNKED, CALL, headers(122, 480)),
}


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    flags.add_argument("--connections", type=int, default=500, help="of each kind (%(default)s)")
    args = flags.parse_args()
    print(f"Python {sys.version.split()[0]}, {args.connections} connections of each kind")
    print("| sent | open | kB each | of which counted |\n|---|---|---|---|")
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as processes:
        for kind in SENT:
            num_open, kb, counted_kb = processes.submit(measured, kind, args.connections).result()
            print(f"| {kind} | {num_open} | {kb:.0f} | {counted_kb:.0f} |", flush=True)


def measured(kind: str, number: int) -> tuple[int, float, float]:
    """Return connections that are open, and the memory of each, and what of it is counted."""
    return uvloop.run(_measured(kind, number))


async def _measured(kind: str, number: int) -> tuple[int, float, float]:
    data = {
        "port": 0,
        # Nobody is there, so that calls wait.
        "instances": [{"url": "http://127.0.0.1:9", "models": ["m"]}],
        "limits": {"max_bodies_mb": 100_000},
        "max_wait_s": 600,
        "shutdown_grace_s": 0.1,
    }
    async with serve(RouterConfig.from_mapping(data, source="benchmark")) as router:
        for client in await asyncio.to_thread(_sent, router, kind, 20):  # whatever is made once
            client.close()
        await asyncio.sleep(0.5)
        gc.collect()
        before = _resident_bytes()
        clients = await asyncio.to_thread(_sent, router, kind, number)
        await asyncio.sleep(1.0)
        listener = router.reload.listeners[-1]
        result = (
            listener.num_connections,
            (_resident_bytes() - before) / number / 1e3,
            listener.bodies.num_bytes / number / 1e3,
        )
        for client in clients:
            client.close()
    return result


def _sent(router: Router, kind: str, number: int) -> list[socket.socket]:
    host, _, port = router.url.partition("://")[2].partition(":")
    clients = [socket.create_connection((host, int(port))) for _ in range(number)]
    for piece in SENT[kind]:
        for client in clients:
            try:
                client.sendall(piece)
            except OSError:
                continue  # cut off
    return clients


def _resident_bytes() -> int:
    num_pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return int(num_pages) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
