"""CPU time of one `schedule()`: vLLM's own scheduler against this package's, in one process.

    python -m benchmarks.schedule_cost

Real schedulers and KV-cache manager, no model: 128 requests decode, the others wait, and between
two steps every running request is given a token. Rounds of both classes alternate; a cell is the
median over all steps of the CPU time of the thread, and the ratio is taken of those.

- `none`: no request carries metadata;
- `all`: every request has a deadline, none is urgent;
- `urgent`: every request has a deadline, and a waiting one is urgent but finds no victim, which
  is the most that the pre-pass can have to do in vain.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from tests.engine.engine_builders import build_request, build_scheduler, run_step, write_config
from vllm_workflow.engine.scheduler import WorkflowScheduler

NUM_RUNNING = 128
CASES = ("none", "all", "urgent")


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


def schedule_us(scheduler: Any, num_steps: int) -> list[float]:
    """CPU time of this thread in `schedule()`, per step."""
    stock, samples = scheduler.schedule, []

    def timed(*args: Any, **kwargs: Any) -> Any:
        start_ns = time.thread_time_ns()
        output = stock(*args, **kwargs)
        samples.append((time.thread_time_ns() - start_ns) / 1e3)
        return output

    scheduler.schedule = timed
    for _ in range(num_steps):
        run_step(scheduler)
    scheduler.schedule = stock
    return samples


def make(model: Path, cls: Any, case: str, num_waiting: int) -> Any:
    """Build a scheduler with 128 requests running and so many waiting."""
    scheduler = build_scheduler(
        model, cls=cls, asynchronous=True, num_seats=NUM_RUNNING, num_blocks=50_000
    )
    fill(scheduler, case, num_waiting)
    return scheduler


def paired_us(
    model: Path, case: str, num_waiting: int, *, num_steps: int = 50, num_rounds: int = 7
) -> tuple[float, float]:
    """Median CPU time of `schedule()` with vLLM's class and with ours, rounds alternating."""
    pair = [make(model, cls, case, num_waiting) for cls in (AsyncScheduler, WorkflowScheduler)]
    samples: list[list[float]] = [[], []]
    for _ in range(num_rounds):
        for scheduler, times in zip(pair, samples, strict=True):
            times += schedule_us(scheduler, num_steps)
    stock_us, ours_us = map(statistics.median, samples)
    return stock_us, ours_us


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--waiting", type=int, nargs="+", default=[100, 1_000, 10_000])
    parser.add_argument("--steps", type=int, default=50, help="steps per round (default: 50)")
    parser.add_argument("--rounds", type=int, default=7, help="rounds per cell (default: 7)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        model = write_config(Path(directory))
        print(f"{'metadata':9} {'waiting':>8} {'vLLM us':>9} {'workflow us':>12} {'ratio':>6}")
        for case in CASES:
            for num_waiting in args.waiting:
                stock_us, ours_us = paired_us(
                    model, case, num_waiting, num_steps=args.steps, num_rounds=args.rounds
                )
                cells = f"{stock_us:9.0f} {ours_us:12.0f} {ours_us / stock_us:6.2f}"
                print(f"{case:9} {num_waiting:8} {cells}", flush=True)


if __name__ == "__main__":
    main()
