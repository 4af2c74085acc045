"""Very many requests through one router: memory, descriptors and the ledger afterwards.

python benchmarks/soak.py --requests 1000000 --json soak.json

Runs come and go, one in four without a word that it ends, each with a prompt whose head its calls
share and no other run does; every fifth answer is streamed, every fiftieth client leaves before its
answer. The servers answer at once. Exits with 1 if memory at any time after
the first tenth is more than 10 % over its level then, if descriptors grow, or if a call is still in
the ledger at the end.
"""

import argparse
import asyncio
import json
import random
import re
import sys
import tempfile
from contextlib import AsyncExitStack, suppress
from pathlib import Path

import aiohttp
import psutil
from http_load import PROMPT
from http_processes import started_router, started_servers
from tqdm import tqdm

from vllm_workflow.bench.compare_flags import writable
from vllm_workflow.cluster.process import ManagedProcess, http_get
from vllm_workflow.core.errors import ConfigError

_NUM_SAMPLES = 100
_CALLS_PER_RUN = 8
_MAX_GROWTH = 0.10
_MAX_MORE_FDS = 16
"""Connections of the pool come and go."""


def main() -> int:
    flags = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    flags.add_argument("--requests", type=int, default=1_000_000, help="in all (%(default)s)")
    flags.add_argument("--concurrency", type=int, default=48, help="(%(default)s)")
    flags.add_argument(
        "--policy", default="workflow", help="or POLICY@FOLDER, of the package there (%(default)s)"
    )
    flags.add_argument("--json", type=Path, metavar="FILE")
    args = flags.parse_args()
    try:
        writable(args.json)
        report = asyncio.run(_soak(args))
    except ConfigError as e:
        flags.error(str(e))
    print(json.dumps({key: value for key, value in report.items() if key != "samples"}, indent=1))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0 if report["passed"] else 1


async def _soak(args: argparse.Namespace) -> dict[str, object]:
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        urls = await started_servers(stack, 2, folder)
        router = await started_router(stack, args.policy, urls, folder)
        traffic = Traffic(router.url)
        session = await stack.enter_async_context(
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
        )
        samples = []
        share = max(1, args.requests // _NUM_SAMPLES)
        for _ in tqdm(range(0, args.requests, share), unit="sample", file=sys.stderr):
            await traffic.send(session, share, args.concurrency)
            samples.append(_sample(router, traffic.num_sent))
        # Answers of clients that left may still be on their way through the router.
        for _ in range(100):
            in_ledger = await _num_in_ledger(router)
            if in_ledger == 0:
                break
            await asyncio.sleep(0.1)
        return _report(args, samples, in_ledger, traffic)


class Traffic:
    """Calls of runs that come and go; the same for the same number of calls."""

    def __init__(self, url: str) -> None:
        self._url = f"{url}/v1/chat/completions"
        self._random = random.Random(0)
        self.num_sent = 0
        self.num_left = 0
        """Calls whose client did not wait for the answer."""
        self.num_failed = 0

    async def send(
        self, session: aiohttp.ClientSession, num_requests: int, concurrency: int
    ) -> None:
        """Send calls, so many at a time, until these have ended."""
        left = iter(range(num_requests))

        async def one_after_the_other() -> None:
            for _ in left:
                await self._call(session)

        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(one_after_the_other())

    async def _call(self, session: aiohttp.ClientSession) -> None:
        number = self.num_sent
        self.num_sent += 1
        run, turn = divmod(number, _CALLS_PER_RUN)
        streams, leaves = number % 5 == 0, number % 50 == 7
        body = {
            "model": "m",
            "messages": [{"role": "user", "content": f"run {run:09d} {PROMPT} turn {turn:040d}"}],
            "max_tokens": 16,
            "stream": streams,
        }
        headers = {
            "X-Workflow-Id": f"run-{run}",
            "X-Workflow-Name": f"workflow-{run % 3}",
            "X-Workflow-Stage": f"stage-{turn}",
            "X-Workflow-Slo-Ms": "600000",
            "X-Workflow-Final": "true" if turn == _CALLS_PER_RUN - 1 and run % 4 else "false",
        }
        timeout = aiohttp.ClientTimeout(total=0.005 * self._random.random() if leaves else 60.0)
        try:
            async with session.post(
                self._url, json=body, headers=headers, timeout=timeout
            ) as response:
                await response.read()
                self.num_failed += response.status != 200
        except TimeoutError:
            self.num_left += leaves
            self.num_failed += not leaves
        except aiohttp.ClientError:
            self.num_failed += not leaves


def _sample(router: ManagedProcess, num_sent: int) -> dict[str, float]:
    (process,) = psutil.Process(router.pid).children()
    memory = process.memory_info().rss / 2**20
    return {"requests": num_sent, "rss_mb": memory, "fds": process.num_fds()}


async def _num_in_ledger(router: ManagedProcess) -> float:
    """Calls that the router holds for in flight or waiting."""
    _, text = await http_get(f"{router.url}/metrics", timeout_s=10.0)
    pattern = rb"^vllm_workflow:router_requests_(?:in_flight|waiting)\S* (\S+)$"
    return sum(float(value) for value in re.findall(pattern, text, re.MULTILINE))


def _report(
    args: argparse.Namespace, samples: list[dict[str, float]], in_ledger: float, traffic: Traffic
) -> dict[str, object]:
    first = samples[max(0, len(samples) // 10 - 1)]
    later = samples[len(samples) // 10 :]
    growth = max(sample["rss_mb"] for sample in later) / first["rss_mb"] - 1.0
    more_fds = later[-1]["fds"] - first["fds"]
    passed = (
        growth <= _MAX_GROWTH
        and more_fds <= _MAX_MORE_FDS
        and in_ledger == 0
        and traffic.num_failed == 0
    )
    return {
        "command": sys.argv,
        "requests": traffic.num_sent,
        "clients_that_left": traffic.num_left,
        "failed": traffic.num_failed,
        "rss_mb_after_a_tenth": first["rss_mb"],
        "rss_mb_at_the_end": later[-1]["rss_mb"],
        "largest_growth": growth,
        "more_fds": more_fds,
        "in_ledger_at_the_end": in_ledger,
        "passed": passed,
        "samples": samples,
    }


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        sys.exit(main())
