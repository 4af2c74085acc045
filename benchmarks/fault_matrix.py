"""What becomes of runs when an instance fails: this project's router, and other people's.

PYTHONPATH=. python benchmarks/fault_matrix.py --router ours vllm-router smg --json faults.json

Two engines, as processes that are really killed and stopped, answer 24 runs of three calls side by
side, half of them streams; while they run, one engine fails. A client tries a call again that it
was told has failed, four times at most, and gives one up that takes 20 s.
"""

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from http_processes import started, started_router

from tests.faults.load import Load, Tally
from tests.faults.processes import EngineProcess, engines
from vllm_workflow.bench import peers
from vllm_workflow.bench.compare_flags import writable
from vllm_workflow.bench.compare_report import versions
from vllm_workflow.bench.system_fleet import free_ports
from vllm_workflow.core.errors import ConfigError, WorkflowError
from vllm_workflow.core.latency import LatencyModel

ROUTERS = {"ours": "workflow", "vllm-router": "vllm-router:round_robin", "smg": "smg:least_load"}
NUM_RUNS, NUM_CALLS, NUM_TOKENS = 24, 3, 20
CLIENT_TIMEOUT_S = 20.0
_BACK_TIMEOUT_S = 70.0
"""Routers that look every minute whether an instance is back need as long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One way in which an instance fails."""

    name: str
    begin: Callable[[list[EngineProcess]], Awaitable[None]]
    end: Callable[[list[EngineProcess]], Awaitable[None]] | None = None
    """Brings it back; None if it was never away."""
    behaviour: Sequence[tuple[str, Any]] = ()
    when: str = "first"
    """What four of its calls must have reached when it begins: `begin` or `first` (token)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What one router made of one fault."""

    router: str
    fault: str
    num_lost_runs: int
    num_truncated: int
    """Calls whose answer looked whole and was not."""
    num_failed: int
    """Calls whose client was told of a failure, or waited too long, and had to try again."""
    num_twice: int
    """Calls that two engines answered to the end; one that is stopped may find out too late that
    nobody wants its answer any more."""
    max_latency_s: float
    """Of calls that ended well."""
    back_s: float | None
    """From when the instance was ready again until it was sent a call; None: not in a minute."""


async def _kill(found: list[EngineProcess]) -> None:
    await found[0].kill()


async def _start(found: list[EngineProcess]) -> None:
    await found[0].start()


async def _stop(found: list[EngineProcess]) -> None:
    found[0].stop()


async def _go_on(found: list[EngineProcess]) -> None:
    found[0].go_on()


async def _restart(found: list[EngineProcess]) -> None:
    await found[0].kill()
    await found[0].start()


async def _all_away_for_a_second(found: list[EngineProcess]) -> None:
    await asyncio.gather(*(engine.kill() for engine in found))
    await asyncio.sleep(1.0)
    await found[1].start()


async def _change_model(found: list[EngineProcess]) -> None:
    await found[0].kill()
    await found[0].start(models=["n"])


def _control(**behaviour: Any) -> Callable[[list[EngineProcess]], Awaitable[None]]:
    async def change(found: list[EngineProcess]) -> None:
        await found[0].control(**behaviour)

    return change


async def _nothing(found: list[EngineProcess]) -> None:
    pass


FAULTS = (
    Fault(name="none", begin=_nothing),
    Fault(
        name="killed in prefill",
        begin=_kill,
        end=_start,
        behaviour=[("prefill_s", 0.3)],
        when="begin",
    ),
    Fault(name="killed in mid-stream", begin=_kill, end=_start),
    Fault(name="killed with a queue", begin=_kill, end=_start, behaviour=[("seats", 2)]),
    Fault(name="stopped (SIGSTOP)", begin=_stop, end=_go_on),
    # vLLM does either of the two after SIGTERM, by chance.
    Fault(name="told to stop, cuts its answers", begin=_control(closing="abort"), end=_restart),
    Fault(name="told to stop, falls silent", begin=_control(closing="hang"), end=_restart),
    Fault(
        name="engine stuck, server well",
        begin=_control(is_deaf=True),
        end=_control(is_deaf=False),
    ),
    Fault(name="ten times slower", begin=_control(slowness=10.0)),
    *(Fault(name=f"answers {s}", begin=_control(status=s)) for s in (500, 503, 429)),
    Fault(name="closes kept connections", begin=_control(closes_kept=True)),
    Fault(name="restarted with another model", begin=_change_model),
    Fault(name="all killed, one back after 1 s", begin=_all_away_for_a_second, end=_start),
)


def main() -> int:
    flags = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    flags.add_argument("--router", nargs="+", choices=ROUTERS, default=list(ROUTERS))
    flags.add_argument("--fault", nargs="+", choices=[f.name for f in FAULTS], metavar="NAME")
    flags.add_argument("--peers-dir", type=Path, default=Path(".cache/peers"))
    flags.add_argument("--json", type=Path, metavar="FILE")
    args = flags.parse_args()
    faults = [fault for fault in FAULTS if not args.fault or fault.name in args.fault]
    rows: list[Row] = []
    try:
        writable(args.json)
        for fault in faults:
            for router in args.router:
                rows.append(asyncio.run(_measure(router, fault, args.peers_dir)))
                print(_line(rows[-1]), flush=True)
    except ConfigError as e:
        flags.error(str(e))
    except WorkflowError as e:
        print(f"{flags.prog}: {e}", file=sys.stderr)
        return 1
    print(_table(rows, args.router))
    if args.json:
        document = {"command": sys.argv, "versions": versions(), "rows": [asdict(r) for r in rows]}
        args.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 0


async def _measure(router: str, fault: Fault, peers_folder: Path) -> Row:
    """Run the load through one router while one thing fails."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        async with AsyncExitStack() as stack:
            found = await stack.enter_async_context(
                engines(folder, 2, token_s=0.02, **dict(fault.behaviour))
            )
            url = await _started(stack, router, [e.url for e in found], folder, peers_folder)
            load = Load(
                url=url, num_calls=NUM_CALLS, num_tokens=NUM_TOKENS, timeout_s=CLIENT_TIMEOUT_S
            )
            task = asyncio.create_task(load.runs(NUM_RUNS))
            while found[0].count(fault.when) < 4 and not task.done():  # noqa: ASYNC110
                await asyncio.sleep(0.005)
            await fault.begin(found)
            tally = await task
            back_s = await _back_s(fault, found, url)
        return _row(router, fault, tally, found, back_s)


async def _started(
    stack: AsyncExitStack, router: str, urls: list[str], folder: Path, peers_folder: Path
) -> str:
    if router == "ours":
        process = await started_router(stack, ROUTERS[router], urls, folder)
        return process.url
    peer = peers.peer(ROUTERS[router])
    executable = await asyncio.to_thread(peers.installed, peer, peers_folder)
    port, metrics_port = free_ports(2)
    front = peers.Front(
        urls=urls,
        latencies=[LatencyModel()] * len(urls),
        port=port,
        metrics_port=metrics_port,
    )
    command = peers.command(peer, executable, front)
    url = f"http://127.0.0.1:{port}"
    await started(stack, peer.name, command, url, folder)
    await _serves(url)
    return url


async def _serves(url: str) -> None:
    """Wait until a router has taken its servers in, which may be after it says it is well."""
    for _ in range(100):
        probe = Load(url=url, num_calls=1, timeout_s=CLIENT_TIMEOUT_S)
        await probe.runs(4, "warm-up")
        if not probe.tally.num_lost_runs:
            return
    raise WorkflowError(f"{url}: serves no call")


async def _back_s(fault: Fault, found: list[EngineProcess], url: str) -> float | None:
    """Bring the instance back; seconds until the router sends it a call, if it ever does."""
    if fault.end is None:
        return 0.0
    num_begun = found[0].count("begin")
    await fault.end(found)
    begin = time.monotonic()
    while time.monotonic() < begin + _BACK_TIMEOUT_S:
        probe = Load(url=url, num_calls=1, num_tokens=1, timeout_s=5.0)
        await probe.runs(4, f"probe-{time.monotonic():.3f}")
        if found[0].count("begin") > num_begun:
            return time.monotonic() - begin
        await asyncio.sleep(0.05)
    return None


def _row(
    router: str, fault: Fault, tally: Tally, found: list[EngineProcess], back_s: float | None
) -> Row:
    ended = Counter(
        name.rpartition(".")[0]  # without the number of the try
        for engine in found
        for name in engine.notes("end")
        if name.startswith("run-")
    )
    num_bad = sum(n for status, n in tally.statuses.items() if status != 200)
    return Row(
        router=router,
        fault=fault.name,
        num_lost_runs=tally.num_lost_runs,
        num_truncated=tally.num_truncated,
        num_failed=num_bad + len(tally.signalled) + tally.num_timeouts,
        num_twice=sum(number > 1 for number in ended.values()),
        max_latency_s=max(tally.latencies, default=0.0),
        back_s=back_s if fault.end else None,
    )


def _line(row: Row) -> str:
    return (
        f"{row.fault:32} {row.router:12} lost {row.num_lost_runs:3} of {NUM_RUNS}, truncated "
        f"{row.num_truncated}, failed {row.num_failed:3}, twice {row.num_twice}, "
        f"longest {row.max_latency_s:5.1f} s, back after {_seconds(row)}"
    )


def _seconds(row: Row) -> str:
    if row.fault not in {fault.name for fault in FAULTS if fault.end}:
        return "–"
    return "never" if row.back_s is None else f"{row.back_s:.1f} s"


def _table(rows: list[Row], routers: Sequence[str]) -> str:
    """Lost runs / truncated / answered twice / failed calls, longest call, back after."""
    lines = [
        "| fault | " + " | ".join(routers) + " |",
        "|---|" + "---|" * len(routers),
    ]
    for fault in dict.fromkeys(row.fault for row in rows):
        cells = [
            f"{row.num_lost_runs} / {row.num_truncated} / {row.num_twice} / {row.num_failed}, "
            f"{row.max_latency_s:.1f} s, {_seconds(row)}"
            for row in rows
            if row.fault == fault
        ]
        lines.append(f"| {fault} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
