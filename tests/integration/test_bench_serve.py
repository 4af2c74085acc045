"""`vllm-workflow bench serve` against a real vLLM server."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.integration.vllm_process import VllmServer
from vllm_workflow.cli.main import main
from vllm_workflow.sim.types import TraceRun
from vllm_workflow.sim.workloads import load

VLLM_FLAGS = (
    *("--scheduler", "workflow", "--max-num-seqs", "8", "--enable-prefix-caching"),
    *("--enable-prompt-tokens-details", "--max-model-len", "8192"),
)
SHRUNK = 16
"""The tiny model is served with 8192 positions; prompts of CHESS are longer."""


def shrunk(runs: tuple[TraceRun, ...], path: Path) -> Path:
    """Write runs with shorter prompts and answers and without pauses, their shape unchanged."""
    lines = []
    for run in runs:
        calls = []
        for call in run.calls:
            parts = [(p.part_id, max(1, p.num_tokens // SHRUNK)) for p in call.prefix]
            num_tail = (call.num_prompt_tokens - sum(p.num_tokens for p in call.prefix)) // SHRUNK
            calls.append(
                {
                    "call_id": call.call_id,
                    "stage": call.stage,
                    "num_prompt_tokens": sum(n for _, n in parts) + max(1, num_tail),
                    "num_output_tokens": max(2, call.num_output_tokens // SHRUNK),
                    "after": call.after,
                    "prefix": [{"part_id": name, "num_tokens": n} for name, n in parts],
                }
            )
        lines.append(json.dumps({"run_id": run.run_id, "workflow": "chess", "calls": calls}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("identity", [[], ["--workflow-xargs"]], ids=["headers", "xargs"])
def test_a_real_server_gives_the_lengths_and_the_hits_of_a_trace(
    vllm_server: VllmServer, tmp_path: Path, identity: list[str]
) -> None:
    trace = load("builtin:chess", num_runs=3, seed=7)
    path = shrunk(trace.runs, tmp_path / "trace.jsonl")
    met = vllm_server.metric("vllm_workflow:deadline_met_total")

    status = main(
        [
            *("bench", "serve", "--base-url", vllm_server.base_url, "--dataset-path", str(path)),
            *("--request-rate", "2", "--slo-s", "120", "--save-detailed", "--disable-tqdm"),
            *("--result-dir", str(tmp_path), "--result-filename", "r.json"),
            *("--html", str(tmp_path / "r.html"), *identity),
        ]
    )

    document = json.loads((tmp_path / "r.json").read_text())
    num_calls = sum(len(run.calls) for run in trace.runs)
    assert status == 0
    assert (document["completed"], document["calls_completed"]) == (3, num_calls)
    assert document["generator"]["calls_with_other_lengths"] == 0
    assert document["slo_attainment"] == 1.0
    assert document["meta"]["server_version"]
    # Blocks of 16 tokens: of shared heads, what fills them is hit, and little else can be.
    most = sum(
        part["num_tokens"]
        for line in path.read_text().splitlines()
        for call in json.loads(line)["calls"]
        for part in call["prefix"]
    )
    assert 0.3 * most < document["total_cached_tokens"] <= most
    met_more = vllm_server.metric("vllm_workflow:deadline_met_total") - met
    assert met_more == (num_calls if identity else 0)
