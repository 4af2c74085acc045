"""A router process in front of an engine process, for whoever throws things at it."""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from vllm_workflow.router.credentials import KeyHash, new_key

FUZZ_S = float(os.environ.get("FUZZ_S", "20"))
"""Time for what takes as long as it is given; `make fuzz` gives more."""


@dataclass(frozen=True)
class Target:
    """A running router."""

    url: str
    key: str
    router: subprocess.Popen[str]
    log: Path

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.url.removeprefix("http://").partition(":")
        return host, int(port)

    def serves(self) -> bool:
        """Whether it answers an ordinary call as it should."""
        request = urllib.request.Request(
            self.url + "/v1/chat/completions",
            data=b'{"model":"m","messages":[]}',
            headers={"Authorization": f"Bearer {self.key}"},
        )
        with urllib.request.urlopen(request, timeout=10) as response:
            return response.status == 200

    def rss_mb(self) -> float:
        lines = Path(f"/proc/{self.router.pid}/status").read_text("ascii").splitlines()
        (line,) = (line for line in lines if line.startswith("VmRSS:"))
        return int(line.split()[1]) / 1024


def _started(*words: str, log: Path) -> tuple[subprocess.Popen[str], str]:
    with log.open("w", encoding="utf-8") as errors:
        process = subprocess.Popen(
            [sys.executable, *words], stdout=subprocess.PIPE, stderr=errors, text=True
        )
    assert process.stdout is not None
    return process, process.stdout.readline()


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    """A router with keys and short timeouts; at its end it still serves and has logged no error."""
    folder = tmp_path_factory.mktemp("fuzz")
    key = new_key()
    engine, engine_line = _started("-m", "tests.fuzz.engine_process", log=folder / "engine.log")
    (folder / "router.yaml").write_text(
        f"""
port: 0
max_body_mb: 4
limits: {{header_timeout_s: 1, body_timeout_s: 1, idle_timeout_s: 5}}
auth: {{keys: [{{tenant: t, acts_for: ["*"], key_hash: "{KeyHash.of(key)}"}}]}}
instances: [{{id: a, url: "{engine_line.strip()}"}}]
""",
        "utf-8",
    )
    words = ("-m", "vllm_workflow.cli.main", "router", "--config", str(folder / "router.yaml"))
    router, line = _started(*words, log=folder / "router.log")
    try:
        yield (here := Target(line.split()[3].rstrip(":"), key, router, folder / "router.log"))
        assert router.poll() is None
        assert here.serves()
        logged = (folder / "router.log").read_text("utf-8")
        assert "ERROR" not in logged, logged[-4000:]
        assert "Traceback" not in logged, logged[-4000:]
    finally:
        for process in (router, engine):
            process.kill()
            process.communicate()
