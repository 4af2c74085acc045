"""The command line against a real socket."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.bench.replay_engine import ReplayEngine
from vllm_workflow.cli.main import main

pytestmark = pytest.mark.anyio

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "benchmark_workflow_serving.py"
RUN = {
    "workflow": "w",
    "calls": [
        {"call_id": "a", "stage": "plan", "num_prompt_tokens": 30, "num_output_tokens": 4},
        {
            "call_id": "b",
            "stage": "write",
            "num_prompt_tokens": 50,
            "num_output_tokens": 6,
            "after": ["a"],
        },
    ],
}


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.jsonl"
    lines = [json.dumps({"run_id": f"r{n}", "arrival_s": 0.01 * n, **RUN}) for n in range(3)]
    path.write_text("\n".join(lines) + "\n")
    return path


async def bench(engine: ReplayEngine, trace: Path | str, *flags: object) -> int:
    words = ["--base-url", engine.url, "--dataset-path", trace, "--disable-tqdm", *flags]
    return await asyncio.to_thread(main, ["bench", "serve", *map(str, words)])


async def result(engine: ReplayEngine, trace: Path, *flags: object) -> dict[str, Any]:
    """Save the result and read it."""
    folder = trace.parent
    saving = ("--save-result", "--result-dir", folder, "--result-filename", "r.json")
    assert await bench(engine, trace, *saving, *flags) == 0
    document: dict[str, Any] = json.loads((folder / "r.json").read_text())
    return document


async def test_a_load_is_printed_saved_and_drawn(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    html = tmp_path / "report.html"
    async with ReplayEngine().serving() as engine:
        document = await result(
            engine,
            trace,
            *("--slo-s", 30, "--label", "here", "--metadata", "note=x", "--html", html),
        )

    assert document["completed"] == document["num_prompts"] == 3
    assert (document["total_input_tokens"], document["total_output_tokens"]) == (240, 30)
    assert (document["request_rate"], document["burstiness"]) == ("inf", 1.0)
    assert (document["label"], document["model_id"], document["note"]) == ("here", "m", "x")
    assert document["slo_attainment"] == 1.0
    assert document["meta"]["trace"] == "trace.jsonl"
    assert document["meta"]["server_version"] == "0.32.0"
    assert document["meta"]["flags"]["slo_s"] == 30
    assert "runs" not in document
    printed = capsys.readouterr().out
    assert re.search(r"^Successful runs: +3$", printed, re.MULTILINE)
    assert re.search(r"^plan +3 ", printed, re.MULTILINE)
    titles = re.findall(r"<h2>(.*?)</h2>", html.read_text())
    assert titles == [
        "Runs",
        "Attainment against SLO scale",
        "Run latency",
        "Calls per stage",
        "Calls per instance",
        "Did the measurement keep up?",
        "Runs, from their arrival",
        "Runs, by the clock",
        "Conditions",
    ]


async def test_details_have_every_call_of_every_run(trace: Path) -> None:
    async with ReplayEngine(instance="fast").serving() as engine:
        document = await result(engine, trace, "--save-detailed", "--self-timed")

    assert document["request_rate"] == "trace"
    assert [run["run_id"] for run in document["runs"]] == ["r0", "r1", "r2"]
    first, second = document["runs"][1]["calls"]
    assert (first["stage"], first["instance"], first["num_output_tokens"]) == ("plan", "fast", 4)
    assert first["planned_s"] == pytest.approx(0.01)
    assert first["sent_s"] <= first["first_token_s"] <= first["end_s"] <= second["sent_s"]


async def test_an_slo_scale_multiplies_the_least_duration_on_a_fleet(trace: Path) -> None:
    async with ReplayEngine().serving() as engine:
        document = await result(
            engine, trace, "--slo-scale", 4, "--fleet", "A100:1", "--save-detailed"
        )

    (run, *_) = document["runs"]
    assert run["slo_s"] == pytest.approx(4 * run["reference_s"])
    assert 0.01 < run["reference_s"] < 10
    assert document["meta"]["slo_reference"] == "the least duration on A100:1"


async def test_a_file_is_repeated_for_more_runs_and_for_warm_ups(trace: Path) -> None:
    async with ReplayEngine().serving() as engine:
        document = await result(
            engine, trace, "--num-prompts", 5, "--num-warmups", 2, "--request-rate", 100
        )

    assert document["completed"] == 5
    assert len(engine.received) == 2 * (5 + 2)
    assert sum("-warmup-" in call.run for call in engine.received) == 2 * 2


async def test_a_load_with_other_lengths_than_its_trace_is_marked_invalid(
    trace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with ReplayEngine(num_extra_tokens=1).serving() as engine:
        document = await result(engine, trace)

    assert document["valid"] is False
    assert any("6 of 6 calls had another" in reason for reason in document["invalid_reasons"])
    assert "INVALID: 6 of 6 calls" in capsys.readouterr().out


@pytest.mark.parametrize(("late_share", "is_late"), [(0.001, False), (0.5, True)])
async def test_late_emulated_gpus_make_a_result_invalid(
    trace: Path, late_share: float, is_late: bool
) -> None:
    async with ReplayEngine(emulated_late_share=late_share).serving() as engine:
        document = await result(engine, trace, "--emulated-server", engine.url)

    # Runs of a few milliseconds beside the server in one process may be invalid anyhow.
    assert any("emulated GPU" in reason for reason in document["invalid_reasons"]) is is_late
    assert not (is_late and document["valid"])
    assert document["emulated_servers"][engine.url]["late_share"] == pytest.approx(late_share)
    assert document["meta"]["fidelity_level"] == 3
    assert document["meta"]["emulated_gpus"][engine.url]["gpu"] == "X"


async def test_a_server_without_an_emulated_gpu_cannot_be_named_as_one(
    trace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with ReplayEngine().serving() as engine:
        assert await bench(engine, trace, "--emulated-server", engine.url) == 2

    assert "no emulated GPU" in capsys.readouterr().err
    assert not engine.received


async def test_a_load_at_another_time_scale_than_its_servers_is_refused(
    trace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with ReplayEngine(emulated_late_share=0.0, time_scale="2").serving() as engine:
        assert await bench(engine, trace, "--emulated-server", engine.url) == 2
        assert "time scale of 2; expected the load's, 1" in capsys.readouterr().err
        flags = ("--emulated-server", engine.url, "--time-scale", 2)
        assert await bench(engine, trace, *flags) == 0


async def test_the_policy_that_a_router_names_is_a_condition(trace: Path) -> None:
    async with ReplayEngine(facts={"policy": "workflow", "fingerprint": "ab12"}).serving() as e:
        document = await result(e, trace)

    assert document["meta"]["policy"] == "workflow"
    assert document["meta"]["fingerprint"] == "ab12"


async def test_secrets_of_headers_are_not_saved(trace: Path) -> None:
    async with ReplayEngine().serving() as engine:
        document = await result(engine, trace, "--header", "Authorization=Bearer hunter2")

    assert engine.received[0].headers["Authorization"] == "Bearer hunter2"
    assert "hunter2" not in json.dumps(document)


async def test_a_vocabulary_can_be_given_where_the_server_cannot_be_asked(
    trace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with ReplayEngine(tokenizes=False).serving() as engine:
        assert await bench(engine, trace) == 2
        assert "--vocab-size" in capsys.readouterr().err
        assert await bench(engine, trace, "--vocab-size", 100) == 0

    assert max(max(call.prompt) for call in engine.received) < 100


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--dataset-path", "missing.jsonl"], "missing.jsonl"),
        (["--dataset-path", "builtin:nothing"], "builtin:nothing"),
        (["--request-rate", "0"], "request rate"),
        (["--burstiness", "-1"], "burstiness"),
        (["--num-prompts", "0"], "number of runs"),
        (["--max-concurrency", "0"], "max concurrency"),
        (["--num-warmups", "-1"], "--num-warmups"),
        (["--slo-s", "0"], "--slo-s"),
        (["--slo-scale", "3"], "--fleet"),
        (["--slo-scale", "3", "--fleet", "Abacus:2"], "Abacus"),
        (["--percentile-metrics", "speed"], "'speed'"),
        (["--metric-percentiles", "50,101"], "--metric-percentiles"),
        (["--goodput", "speed:1"], "--goodput"),
        (["--extra-body", "{"], "--extra-body"),
        (["--extra-body", "[1]"], "--extra-body"),
        (["--header", "novalue"], "--header"),
        (["--metadata", "novalue"], "--metadata"),
        (["--result-dir", "/dev/null/at/all"], "--result-dir"),
        (["--html", "/dev/null/at/all/r.html"], "--html"),
        (["--base-url", "ftp://x"], "base URL"),
        (["--base-url", "http://127.0.0.1:9", "--model", "m"], "127.0.0.1:9"),
        (["--endpoint", "v1"], "endpoint"),
        (["--call-timeout-s", "0"], "call timeout"),
        (["--time-scale", "0"], "time scale"),
        (["--max-tokens", "0"], "max tokens"),
        (["--vocab-size", "3", "--model", "m"], "vocabulary"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(
    flags: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "serve", "--disable-tqdm", "--num-prompts", "2", *flags]) == 2

    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("vllm-workflow: ")
    assert said in line


def test_its_help_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["bench", "serve", "--help"])

    assert "--emulated-server" in capsys.readouterr().out


async def test_ctrl_c_ends_the_calls_under_way_without_a_traceback(trace: Path) -> None:
    async with ReplayEngine(held=True).serving() as engine:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, str(SCRIPT), "--base-url", engine.url),
            *("--dataset-path", str(trace)),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        await engine.wait_for(received=3)
        process.send_signal(signal.SIGINT)
        _, errors = await process.communicate()
        await engine.wait_for(aborted=3)

    assert process.returncode == 130
    assert b"Traceback" not in errors
