"""The README's examples, run as they stand; only what is not there for tests is replaced."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.integration.vllm_process import START_TIMEOUT_S, serve_environment
from tests.readme import ROOT, commands, example

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
ROUTER = "http://127.0.0.1:8080"


def environment() -> dict[str, str]:
    """With the commands of this environment first, as in an activated one."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**serve_environment(), "PATH": path}


@contextmanager
def running(script: str, cwd: Path, log_path: Path) -> Iterator[None]:
    """Run shell lines, and end every process that they leave behind."""
    with log_path.open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            ["bash", "-c", f"{script}\nwait"],
            cwd=cwd,
            env=environment(),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(timeout=40)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def await_models(url: str, log_path: Path, *, instances: int = 1) -> str:
    """Wait until the router has that many healthy instances; return the first model's name."""
    give_up = time.monotonic() + 2 * START_TIMEOUT_S
    while time.monotonic() < give_up:
        try:
            with urllib.request.urlopen(f"{url}/v1/models", timeout=5) as answer:
                models = json.load(answer)["data"]
            with urllib.request.urlopen(f"{url}/metrics", timeout=5) as answer:
                lines = answer.read().decode().splitlines()
            up = [x for x in lines if x.startswith("vllm_workflow:router_instance_healthy{")]
            if models and sum(x.endswith(" 1.0") for x in up) >= instances:
                return str(models[0]["id"])
        except (urllib.error.URLError, OSError):
            pass
        time.sleep(1)
    raise RuntimeError(
        f"no models at {url}; end of log:\n{log_path.read_text(encoding='utf-8')[-3000:]}"
    )


def shell(line: str, cwd: Path) -> str:
    """Run one line to its end; return what it printed."""
    done = subprocess.run(
        ["bash", "-c", line],
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_quick_start_and_client_example(tiny_model: Path, tmp_path: Path) -> None:
    pip, *rest = commands("quick start")
    # The Makefile runs the same line, editable, to set up the environment of this test.
    assert pip.replace("install", "install -q -e") in MAKEFILE
    flags = "--load-format dummy --enforce-eager --max-model-len 1024 --served-model-name MODEL"
    script = "\n".join(f"{line} &" for line in rest)
    script = script.replace("vllm serve MODEL", f"vllm serve {tiny_model} {flags}")
    log = tmp_path / "quick-start.log"
    with running(script, tmp_path, log):
        await_models(ROUTER, log, instances=2)
        done = subprocess.run(
            [sys.executable, "-c", example("client")],
            env=environment(),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        lines = [line.split() for line in done.stdout.splitlines()]
        assert [line[0] for line in lines] == ["draft", "polish"]
        assert {line[1] for line in lines} <= {"127.0.0.1:8001", "127.0.0.1:8002"}


def test_up_and_ask_answer_a_question_from_the_database(tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    log = tmp_path / "up.log"
    with running(f"{commands('shop')[0]}\n{commands('up')[0]} &", tmp_path, log):
        await_models(ROUTER, log, instances=2)
        printed = shell(commands("ask")[0], tmp_path)
    assert "SELECT COUNT(*) FROM orders" in printed
    assert "generate" in printed


def test_policies_are_compared_by_simulation(tmp_path: Path) -> None:
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    printed = shell(commands("compare")[0], tmp_path)

    assert all(name in printed for name in ("workflow", "least-outstanding+fcfs", "hexgen+urgency"))
    assert "<svg" in (tmp_path / "compare.html").read_text(encoding="utf-8")


def test_a_trace_is_analysed(tmp_path: Path) -> None:
    assert "critical path" in shell(commands("analyze")[0], tmp_path)
    assert "<svg" in (tmp_path / "chess.html").read_text(encoding="utf-8")


def test_runs_are_replayed_against_an_emulated_gpu(tmp_path: Path) -> None:
    model, serve = commands("emulate")
    shell(model, tmp_path)
    log = tmp_path / "serve.log"
    with running(f"{serve} &", tmp_path, log):
        give_up = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                with urllib.request.urlopen("http://127.0.0.1:8001/health", timeout=5):
                    break
            except (urllib.error.URLError, OSError):
                assert time.monotonic() < give_up, log.read_text(encoding="utf-8")[-3000:]
                time.sleep(0.5)
        printed = shell(commands("bench")[0], tmp_path)

    assert "Successful runs" in printed


def test_router_example_starts_from_the_router_yaml(tmp_path: Path) -> None:
    (tmp_path / "router.yaml").write_text(example("router.yaml"), encoding="utf-8")
    assert shutil.which("vllm-workflow", path=environment()["PATH"])
    log = tmp_path / "router.log"
    with running(f"{commands('router')[0]} &", tmp_path, log):
        give_up = time.monotonic() + 30
        while "router ready on http://127.0.0.1:8080" not in log.read_text(encoding="utf-8"):
            assert time.monotonic() < give_up, log.read_text(encoding="utf-8")
            time.sleep(0.2)
