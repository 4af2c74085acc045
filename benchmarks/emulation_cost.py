"""CPU time of one step in the worker of an emulated GPU, in one process.

    python -m benchmarks.emulation_cost

vLLM's own asynchronous scheduler and KV-cache manager; so many requests decode. A cell is the
median over all steps of the CPU time of the thread: `worker` is `execute_model`, `sample_tokens`
and `get_output` without waiting, `engine` is `schedule()` and `update_from_output()`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.engine.engine_builders import build_request, build_scheduler
from vllm_workflow.emulation.model_dir import write_model_dir
from vllm_workflow.emulation.settings import EmulationSettings
from vllm_workflow.emulation.worker import EmulatedGpuWorker
from vllm_workflow.profiles import catalogue


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--running", type=int, nargs="+", default=[1, 32, 128])
    parser.add_argument("--steps", type=int, default=500, help="steps per row (default: 500)")
    args = parser.parse_args()
    # As fast as it goes: nothing is waited for.
    settings = EmulationSettings(gpu="H100", model_shape="llama-3.1-8b", time_scale="1e9")
    settings.to_environment(os.environ)
    with tempfile.TemporaryDirectory() as directory:
        model = Path(directory, "model")
        write_model_dir(catalogue.shape("llama-3.1-8b"), model)
        print(f"{'running':>8} {'engine us':>10} {'worker us':>10}")
        for num_running in args.running:
            engine_us, worker_us = step_us(model, num_running, args.steps)
            print(f"{num_running:8} {engine_us:10.0f} {worker_us:10.1f}", flush=True)


def step_us(model: Path, num_running: int, num_steps: int) -> tuple[float, float]:
    """Medians of a step's CPU time: vLLM's engine, the worker."""
    scheduler = build_scheduler(model, asynchronous=True, num_seats=num_running, num_blocks=50_000)
    config = scheduler.vllm_config
    config.model_config.skip_tokenizer_init = False
    worker = EmulatedGpuWorker(config, local_rank=0, rank=0, distributed_init_method="")
    worker.load_model()
    for i in range(num_running):
        scheduler.add_request(build_request(str(i), max_tokens=num_steps + 100))
    engine, emulated = [], []
    in_flight: list[tuple[Any, Any]] = []
    for _ in range(num_steps):
        t0 = time.thread_time_ns()
        output = scheduler.schedule()
        t1 = time.thread_time_ns()
        worker.execute_model(output)
        in_flight.append((output, worker.sample_tokens(None)))
        t2 = time.thread_time_ns()
        if len(in_flight) == 1:
            continue
        done, pending = in_flight.pop(0)
        t3 = time.thread_time_ns()
        result = pending.get_output()
        t4 = time.thread_time_ns()
        scheduler.update_from_output(done, result)
        t5 = time.thread_time_ns()
        engine.append((t1 - t0 + t5 - t4) / 1e3)
        emulated.append((t2 - t1 + t4 - t3) / 1e3)
    return statistics.median(engine), statistics.median(emulated)


if __name__ == "__main__":
    main()
