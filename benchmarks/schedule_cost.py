"""CPU time of one `schedule()`: vLLM's own scheduler against this package's, in one process.

    python -m benchmarks.schedule_cost

Real schedulers and KV-cache manager, no model: 128 requests decode, the others wait, and between
two steps every running request is given a token. Steps of both classes alternate, and which goes
first; a cell is the median over all pairs of the CPU time of the thread, ours over vLLM's of the
same pair, and the quartiles of the medians of twenty pairs each say how sure that is.

- `none`: no request carries metadata;
- `all`: every request has a deadline, none is urgent;
- `urgent`: every request has a deadline, and a waiting one is urgent but finds no victim, which
  is the most that the pre-pass can have to do in vain.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from tests.engine.engine_builders import build_request, build_scheduler, run_step, write_config
from vllm_workflow.engine.scheduler import WorkflowScheduler

NUM_RUNNING = 128
CASES = ("none", "all", "urgent")
NUM_WARM_UP = 20
BLOCK = 20
"""Pairs whose median ratio is one sample of the spread."""


def fill(scheduler: Any, case: str, num_waiting: int) -> None:
    """Have 128 requests running and so many waiting."""
    metadata = {} if case == "none" else {"wf_id": "run", "wf_service_ms": 1_000}
    running = metadata if case == "none" else metadata | {"wf_budget_ms": 7_000_000}
    if case == "urgent":
        running = metadata | {"wf_budget_ms": 0}
    for i in range(NUM_RUNNING):
        scheduler.add_request(build_request(f"r{i}", max_tokens=4_000, **running))
    run_step(scheduler)
    for i in range(num_waiting):
        waiting = metadata if case == "none" else metadata | {"wf_budget_ms": 6_000_000 + i}
        if case == "urgent" and i == 0:
            waiting = metadata | {"wf_budget_ms": 1}
        scheduler.add_request(build_request(f"w{i}", max_tokens=4_000, **waiting))


def schedule_us(scheduler: Any) -> float:
    """Run one engine step; return the CPU time of this thread in its `schedule()`."""
    stock, spent_us = scheduler.schedule, 0.0

    def timed(*args: Any, **kwargs: Any) -> Any:
        nonlocal spent_us
        start_ns = time.thread_time_ns()
        output = stock(*args, **kwargs)
        spent_us = (time.thread_time_ns() - start_ns) / 1e3
        return output

    scheduler.schedule = timed
    run_step(scheduler)
    scheduler.schedule = stock
    return spent_us


def make(model: Path, cls: Any, case: str, num_waiting: int) -> Any:
    """Build a scheduler with 128 requests running and so many waiting."""
    scheduler = build_scheduler(
        model, cls=cls, asynchronous=True, num_seats=NUM_RUNNING, num_blocks=50_000
    )
    fill(scheduler, case, num_waiting)
    return scheduler


class Paired(NamedTuple):
    """One cell: CPU time of `schedule()` with vLLM's class, and ours over that."""

    stock_us: float
    ratio: float
    low: float
    """First quartile of the ratios of blocks."""
    high: float


def paired(model: Path, case: str, num_waiting: int, *, num_pairs: int = 400) -> Paired:
    """Time both classes step by step in turn."""
    stock, ours = (
        make(model, cls, case, num_waiting) for cls in (AsyncScheduler, WorkflowScheduler)
    )
    pairs: list[tuple[float, float]] = []
    gc.collect()
    gc.disable()
    try:
        for index in range(num_pairs + NUM_WARM_UP):
            if index % 2:
                ours_us, stock_us = schedule_us(ours), schedule_us(stock)
            else:
                stock_us, ours_us = schedule_us(stock), schedule_us(ours)
            pairs.append((stock_us, ours_us))
    finally:
        gc.enable()
    pairs = pairs[NUM_WARM_UP:]
    ratios = [ours_us / stock_us for stock_us, ours_us in pairs]
    blocks = [statistics.median(ratios[i : i + BLOCK]) for i in range(0, len(ratios), BLOCK)]
    low, _, high = statistics.quantiles(blocks, n=4)
    return Paired(
        statistics.median(stock_us for stock_us, _ in pairs), statistics.median(ratios), low, high
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--waiting", type=int, nargs="+", default=[100, 1_000, 10_000])
    parser.add_argument("--pairs", type=int, default=400, help="steps of each (default: 400)")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        model = write_config(Path(directory))
        print(f"{'metadata':9} {'waiting':>8} {'vLLM us':>9} {'ratio':>6} {'quartiles':>12}")
        for case in args.cases:
            for num_waiting in args.waiting:
                cell = paired(model, case, num_waiting, num_pairs=args.pairs)
                print(
                    f"{case:9} {num_waiting:8} {cell.stock_us:9.0f} {cell.ratio:6.3f}"
                    f"  {cell.low:.3f}-{cell.high:.3f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
