"""A real `vllm serve` process, and how tests start and end it."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

START_TIMEOUT_S = 240.0
PORTS = range(18200, 18300)


@dataclasses.dataclass(frozen=True)
class VllmServer:
    """A running server; `model` is the name it serves."""

    base_url: str
    model: str
    log_path: Path
    pid: int

    def warm_up(self) -> None:
        """Answer a prompt of some length, before any short one.

        On a CPU with AMX, vLLM 0.32's attention ends its worker by an illegal instruction unless a
        product of larger matrices has asked the kernel for the tiles before.
        """
        body = {"model": self.model, "prompt": "select name from where city " * 4, "max_tokens": 2}
        request = urllib.request.Request(
            f"{self.base_url}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            answer.read()

    def metrics_text(self) -> str:
        """`/metrics` as it is."""
        with urllib.request.urlopen(f"{self.base_url}/metrics", timeout=60) as answer:
            text: str = answer.read().decode()
        return text

    def metrics(self) -> dict[str, float]:
        """Every sample of `/metrics`, by its name and labels as they are printed."""
        lines = self.metrics_text().splitlines()
        samples = (line.rpartition(" ") for line in lines if line and line[0] != "#")
        return {name: float(value) for name, _, value in samples}

    def metric(self, name: str, **labels: str) -> float:
        """Sum of the samples of one name whose labels include those given."""
        wanted = [f'{label}="{value}"' for label, value in labels.items()]
        return sum(
            value
            for sample, value in self.metrics().items()
            if sample.partition("{")[0] == name and all(w in sample for w in wanted)
        )


@contextmanager
def serving(
    model: Path, log_path: Path, flags: Sequence[str] = (), *, port: int | None = None
) -> Iterator[VllmServer]:
    """Serve a model until the block ends, however it ends; at a free port unless one is given."""
    port = port or free_port()
    base_url = f"http://127.0.0.1:{port}"
    with log_path.open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            serve_command(model, port, *flags),
            stdout=log,
            stderr=subprocess.STDOUT,
            env=serve_environment(),
            start_new_session=True,
        )
    try:
        _await_health(process, base_url, log_path)
        yield VllmServer(base_url, "tiny", log_path, process.pid)
    finally:
        _stop(process)


def serve_command(model: Path, port: int, *flags: str) -> list[str]:
    """A command line that starts in seconds and needs about a gigabyte."""
    return [
        *(sys.executable, "-W", "ignore", "-m", "vllm.entrypoints.cli.main", "serve", str(model)),
        *("--host", "127.0.0.1", "--port", str(port), "--served-model-name", "tiny"),
        *("--enforce-eager", "--max-model-len", "8192", "--load-format", "dummy"),
        *flags,
    ]


def serve_environment() -> dict[str, str]:
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    return {**environment, "VLLM_NO_USAGE_STATS": "1"}


def free_port() -> int:
    for port in PORTS:
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise RuntimeError(f"no free port in {PORTS}")


def _await_health(process: subprocess.Popen[bytes], base_url: str, log_path: Path) -> None:
    give_up = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < give_up:
        if process.poll() is not None:
            break
        try:
            with urllib.request.urlopen(f"{base_url}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    tail = log_path.read_text(encoding="utf-8", errors="replace")[-3000:]
    raise RuntimeError(f"vLLM did not start; end of {log_path}:\n{tail}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the server's whole process group, politely first."""
    for signal_number, patience_s in ((signal.SIGTERM, 30), (signal.SIGKILL, 10)):
        try:
            os.killpg(process.pid, signal_number)
            process.wait(timeout=patience_s)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue
