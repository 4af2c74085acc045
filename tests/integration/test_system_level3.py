"""Level 3 from one end to the other: emulated servers, our router, whole runs, all stopped."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from vllm_workflow.bench import system
from vllm_workflow.bench.compare_jobs import Setting, Setup
from vllm_workflow.bench.system import SystemOptions
from vllm_workflow.bench.system_router import systems
from vllm_workflow.emulation.lateness import MAX_LATE_SHARE

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed"),
]
SETUP = Setup(
    fleet="A100:1,L40S:1",
    model_shape="llama-3.1-8b",
    weight_bits=16,
    tp=1,
    gpu_memory_utilization=0.9,
    num_runs=4,
    burstiness=1.0,
)
SETTING = Setting(trace="builtin:chess", rate=0.4, load=None, slo_scale=5.0, slo_s=None)


def processes_naming(path: Path) -> list[str]:
    """Command lines of all processes that have a path below this one in them."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes().decode(errors="replace").replace("\0", " ")
        except OSError:
            continue  # ended meanwhile
        if str(path) in words:
            found.append(words)
    return found


def test_runs_go_through_our_router_to_emulated_servers_and_nothing_is_left_running(
    tmp_path: Path,
) -> None:
    options = SystemOptions(time_scale=1.5, workdir=tmp_path, peers=tmp_path / "peers")
    alive: list[list[str]] = []

    (found,) = system.run(
        systems(["workflow"]),
        [SETTING],
        SETUP,
        1,
        options,
        done=lambda: alive.append(processes_naming(tmp_path)),
    )

    assert found.problem == ""
    assert found.sample is not None
    assert len(found.sample.latencies_s) == 4
    assert all(
        reference_s < latency_s < 600.0
        for latency_s, reference_s in zip(found.sample.latencies_s, found.sample.references_s)
    )
    assert found.figures["calls_failed"] == 0
    assert {row["instance"] for row in found.figures["per_instance"]} <= {"a100-0", "l40s-0"}
    assert found.figures["total_cached_tokens"] > 0.2 * found.figures["total_input_tokens"]
    # A machine that is busy otherwise may be too slow; what must not be is that nobody says so.
    shares = [each["late_share"] for each in found.figures["emulated_servers"].values()]
    assert len(shares) == 2
    assert max(shares) <= MAX_LATE_SHARE or found.reasons
    assert sum("vllm.entrypoints" in words for words in alive[0]) >= 2
    assert processes_naming(tmp_path) == []
    (line,) = (tmp_path / system.MEASUREMENTS).read_text().splitlines()
    assert json.loads(line)["latencies_s"] == list(found.sample.latencies_s)
