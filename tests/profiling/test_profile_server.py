"""`vllm-workflow profile` against a server whose step times are known."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.profiling.timed_engine import TimedEngine
from vllm_workflow.cli.main import main
from vllm_workflow.core.errors import ConfigError, UpstreamError
from vllm_workflow.core.latency import LatencyModel
from vllm_workflow.profiles.profile import LatencyProfile
from vllm_workflow.profiling.plan import Limits, plan
from vllm_workflow.profiling.prober import Measured, fitted_profile, measure

TRUE = LatencyModel(
    overhead_s=0.002,
    weights_s=0.010,
    per_token_s=80e-6,
    per_token_below_knee_s=30e-6,
    num_knee_tokens=200,
    per_seq_s=200e-6,
    per_kv_token_s=2e-6,
    max_num_batched_tokens=512,
)
SMALL = Limits(max_prompt_tokens=1024, max_num_seqs=4, num_repeats=2, max_seconds=60.0)
LOADS = (
    {"num_decode_seqs": 1, "num_kv_tokens": 100},
    {"num_decode_seqs": 4, "num_kv_tokens": 4 * 1000},
    {"num_decode_seqs": 4, "num_kv_tokens": 4 * 200},
    {"num_prefill_tokens": 512},
    {"num_prefill_tokens": 256, "num_decode_seqs": 3, "num_kv_tokens": 3 * 500},
)
"""Steps like those that the probes make."""


@contextmanager
def in_thread(engine: TimedEngine) -> Iterator[TimedEngine]:
    """Serve from a loop of its own, as the command runs one too."""
    loop, ready, done = asyncio.new_event_loop(), threading.Event(), asyncio.Event()

    async def serve() -> None:
        async with engine.serving():
            ready.set()
            await done.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    assert ready.wait(10)
    try:
        yield engine
    finally:
        loop.call_soon_threadsafe(done.set)
        thread.join()
        loop.close()


@pytest.mark.slow
def test_the_command_recovers_the_step_times_of_a_server(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    flags = ["--max-prompt-tokens", "1024", "--max-num-seqs", "4", "--num-repeats", "3"]
    flags += ["--max-num-batched-tokens", "512", "--disable-tqdm"]
    with in_thread(TimedEngine(latency=TRUE)) as engine:
        base_url = f"{engine.url}/v1"
        status = main(["profile", "--base-url", base_url, "--output", str(path), *flags])

    found = LatencyProfile.from_file(path)
    assert status == 0
    for load in LOADS:
        assert found.latency.step_s(**load) == pytest.approx(TRUE.step_s(**load), rel=0.2), load
    assert (found.num_kv_blocks, found.block_size) == (4096, 16)
    assert found.latency.max_num_batched_tokens == 512
    assert found.conditions["model"] == "m"
    assert found.conditions["vllm_version"] == "0.0.fake"
    assert found.residuals["all"]["mean_error"] < 0.1
    assert engine.num_beside == 4


@pytest.mark.anyio
async def test_no_two_prompts_begin_alike() -> None:
    limits = Limits(max_prompt_tokens=64, max_num_seqs=2, num_repeats=1)
    async with TimedEngine(latency=LatencyModel(overhead_s=1e-4, weights_s=0.0)).serving() as e:
        await measure(e.url, limits=limits)

    assert len({tuple(prompt[:16]) for prompt in e.prompts}) == len(e.prompts)


@pytest.mark.anyio
async def test_when_time_is_up_nothing_further_is_begun() -> None:
    num_planned: list[int] = []
    async with TimedEngine(latency=TRUE).serving() as engine:
        _, measured = await measure(
            engine.url, limits=Limits(max_seconds=0.05), on_plan=num_planned.append
        )

    assert 0 < measured.num_skipped < num_planned[0]


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("engine", "message"),
    [
        (TimedEngine(latency=TRUE, num_running=3), "expected an idle server, got 3 requests"),
        (TimedEngine(latency=TRUE, status=500), "expected status 200, got 500 .*scripted"),
        (TimedEngine(latency=TRUE, num_short=1), "expected 1 tokens and a usage"),
    ],
    ids=["busy", "failing", "stops early"],
)
async def test_a_server_that_cannot_be_measured_says_why(engine: TimedEngine, message: str) -> None:
    async with engine.serving():
        with pytest.raises(UpstreamError, match=message):
            await measure(engine.url, limits=SMALL)


@pytest.mark.anyio
async def test_another_model_than_the_server_s_is_named() -> None:
    async with TimedEngine(latency=TRUE).serving() as engine:
        with pytest.raises(UpstreamError, match=r"expected model 'other' .*got .*'id': 'm'"):
            await measure(engine.url, model="other", limits=SMALL)


@pytest.mark.anyio
async def test_nobody_at_the_address_is_an_upstream_error() -> None:
    with socket.socket() as bound:  # and never listening
        bound.bind(("127.0.0.1", 0))
        base_url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        with pytest.raises(UpstreamError, match=f"{base_url}/v1/models: ClientConnector"):
            await measure(base_url, limits=SMALL)


def test_the_url_of_no_server_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", "--base-url", "localhost:8000", "--disable-tqdm"]) == 2
    assert "base_url: expected http://HOST:PORT, got 'localhost:8000'" in capsys.readouterr().err


def test_too_few_measurements_make_no_profile() -> None:
    with pytest.raises(ConfigError, match="expected at least 8 observations, got 0"):
        fitted_profile(None, Measured(), max_num_batched_tokens=512)  # type: ignore[arg-type]


def test_probes_fill_half_of_the_kv_cache_at_most() -> None:
    probes = plan(Limits(), max_model_len=100_000, num_kv_tokens=4000)

    assert max(p.num_seqs * (p.num_prompt_tokens + p.num_output_tokens) for p in probes) <= 2001
    assert {p.num_seqs for p in probes} == {1, 2, 4, 8}


def test_probes_fit_into_the_model_s_length() -> None:
    probes = plan(Limits(), max_model_len=1000, num_kv_tokens=None)

    assert max(p.num_prompt_tokens + p.num_output_tokens for p in probes) <= 1000


def test_a_server_of_tiny_sequences_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"takes 64 prompt tokens, got .* takes 48"):
        plan(Limits(), max_model_len=50, num_kv_tokens=None)


@pytest.mark.parametrize(
    "values", [{"max_num_seqs": 0}, {"num_repeats": 0}, {"max_prompt_tokens": 3}]
)
def test_limits_that_leave_nothing_are_refused(values: dict[str, int]) -> None:
    (name,) = values
    with pytest.raises(ConfigError, match=f"{name}: expected at least"):
        Limits(**values)


def test_step_timings_of_a_file_are_fitted(tmp_path: Path) -> None:
    steps, output = tmp_path / "steps.csv", tmp_path / "p.json"
    rows = ["step_ms,num_prefill_tokens,num_decode_seqs,num_kv_tokens"]
    for p in (0, 64, 256, 512):
        for b in (1, 8, 64):
            for context in (100, 1000):
                ms = 1e3 * TRUE.step_s(
                    num_prefill_tokens=p, num_decode_seqs=b, num_kv_tokens=b * context
                )
                rows.append(f"{ms},{p},{b},{b * context}")
    steps.write_text("\n".join(rows) + "\n")

    status = main(["profile", "--steps", str(steps), "--output", str(output)])

    written = json.loads(output.read_text())
    assert status == 0
    assert written["residuals"]["mean_error"] < 0.03
    assert written["latency"]["per_kv_token_us"] == pytest.approx(2.0, rel=0.1)


def test_a_table_s_mistake_is_told_with_line_and_column(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "requests.jsonl"
    path.write_text('{"first_token_time": 1, "last_token_time": 2, "num_prompt_tokens": -5}\n')

    assert main(["profile", "--requests", str(path), "--output", str(tmp_path / "p.json")]) == 2
    assert (
        f"{path}, line 1: num_prompt_tokens: expected a number from 0, got -5"
        in capsys.readouterr().err
    )


def test_an_output_nowhere_is_refused_before_anything_is_measured(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["profile", "--base-url", "http://x:1", "--output", "/none/p.json"]) == 2
    assert "expected a file in an existing directory" in capsys.readouterr().err


def test_a_gpu_without_a_shape_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", "--base-url", "http://x:1", "--gpu", "L4"]) == 2
    assert "--gpu and --model-shape: expected both or none" in capsys.readouterr().err
