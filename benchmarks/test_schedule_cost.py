"""CPU time of one engine step of the scheduler, under pytest-benchmark.

    pytest benchmarks/test_schedule_cost.py

A step is `schedule()` and `update_from_output()`: 128 requests decode, the others wait. Times are
CPU time of the thread, so that other work on the machine disturbs little; compare rows of one
group only, and of one session. `python -m benchmarks.schedule_cost` has the paired ratios.
"""

import time
import warnings
from pathlib import Path

import pytest

pytest.importorskip("vllm")

with warnings.catch_warnings():  # those of vLLM's dependencies are none of ours
    warnings.simplefilter("ignore")
    from benchmarks.schedule_cost import AsyncScheduler, WorkflowScheduler, make, paired
    from tests.engine.engine_builders import run_step, write_config

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

MOST = 2.0
"""Times vLLM's own `schedule()` that ours may cost before something must be wrong with it."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("model"))


@pytest.mark.benchmark(timer=time.thread_time)
@pytest.mark.parametrize("num_waiting", [100, 1_000, 10_000])
@pytest.mark.parametrize(
    ("cls", "case"),
    [
        pytest.param(AsyncScheduler, "none", id="vllm"),
        pytest.param(WorkflowScheduler, "none", id="workflow-without-metadata"),
        pytest.param(WorkflowScheduler, "all", id="workflow"),
        pytest.param(WorkflowScheduler, "urgent", id="workflow-urgent"),
    ],
)
def test_step(benchmark, model: Path, cls: type, case: str, num_waiting: int) -> None:  # type: ignore[no-untyped-def]
    benchmark.group = f"{num_waiting} waiting"
    scheduler = make(model, cls, case, num_waiting)

    benchmark.pedantic(run_step, args=(scheduler,), rounds=200, warmup_rounds=20)

    assert len(scheduler.running) == 128
    assert scheduler.get_request_counts()[1] == num_waiting


@pytest.mark.parametrize("num_waiting", [100, 1_000, 10_000])
@pytest.mark.parametrize("case", ["none", "all", "urgent"])
def test_schedule_costs_about_what_vllms_own_does(model: Path, case: str, num_waiting: int) -> None:
    cell = paired(model, case, num_waiting)

    print(
        f"\n{case:6} {num_waiting:6} waiting: vLLM {cell.stock_us:.0f} µs, ours {cell.ratio:.3f} "
        f"times that (quartiles {cell.low:.3f} to {cell.high:.3f})"
    )
    assert cell.ratio < MOST
