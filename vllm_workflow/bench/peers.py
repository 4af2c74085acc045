"""Other people's routers, as they come from PyPI, in front of the same servers.

Each lives in a virtual environment of its own: their packages may not be mixed with ours.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from vllm_workflow.core.errors import ConfigError, UpstreamError


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """One router under one of its policies."""

    name: str
    requirement: str
    """As pip takes it; pinned, so that a figure can be made again."""
    arguments: Callable[[Sequence[str], int, int], list[str]]
    """Worker URLs, port, metrics port -> words of the command line, executable first."""
    agentic_context: bool = False
    """Runs are told to it in `vllm_xargs.agentic_context`, which stock vLLM itself refuses."""


def _vllm_router(policy: str, *more: str) -> Callable[[Sequence[str], int, int], list[str]]:
    def words(urls: Sequence[str], port: int, metrics_port: int) -> list[str]:
        return [
            *("vllm-router", "--host", "127.0.0.1", "--port", str(port)),
            *("--worker-urls", *urls, "--policy", policy),
            *("--prometheus-host", "127.0.0.1", "--prometheus-port", str(metrics_port)),
            *("--worker-startup-check-interval", "1", "--queue-size", "10000"),
            *("--queue-timeout-secs", "3600", "--request-timeout-secs", "3600"),
            *("--max-concurrent-requests", "10000"),
            *more,
        ]

    return words


def _smg(policy: str) -> Callable[[Sequence[str], int, int], list[str]]:
    def words(urls: Sequence[str], port: int, metrics_port: int) -> list[str]:
        return [
            *("smg", "launch", "--host", "127.0.0.1", "--port", str(port)),
            *("--worker-urls", *urls, "--policy", policy, "--backend", "vllm"),
            *("--prometheus-host", "127.0.0.1", "--prometheus-port", str(metrics_port)),
            *("--worker-startup-check-interval", "1", "--request-timeout-secs", "3600"),
            *("--max-concurrent-requests", "10000"),
        ]

    return words


_PROGRAM = json.dumps({"program_scheduling_enable_key": "auto", "global_queue": True})

PEERS: Mapping[str, Peer] = MappingProxyType(
    {
        peer.name: peer
        for peer in (
            *(
                Peer(
                    name=f"vllm-router:{policy}",
                    requirement="vllm-router==0.1.17",
                    arguments=_vllm_router(policy),
                )
                for policy in ("round_robin", "consistent_hash", "cache_aware")
            ),
            Peer(
                name="vllm-router:program",
                requirement="vllm-router==0.1.17",
                arguments=_vllm_router(
                    "consistent_hash",
                    "--enable-program-scheduling",
                    "--program-scheduling-config-json",
                    _PROGRAM,
                ),
            ),
            Peer(
                name="smg:least_load",
                requirement="smg==1.13.0",
                arguments=_smg("least_load"),
            ),
        )
    }
)
"""By the name that `--policies` takes at level 3: `ROUTER:POLICY`."""


def peer(name: str) -> Peer:
    """Return a peer by name.

    Raises:
        ConfigError: Not one of `PEERS`.
    """
    if name not in PEERS:
        raise ConfigError(f"peer: expected one of {sorted(PEERS)}, got {name!r}")
    return PEERS[name]


def installed(wanted: Peer, folder: Path) -> Path:
    """Install a peer unless it is there; return its executable.

    Args:
        wanted: Which.
        folder: One virtual environment per requirement is made in it.

    Raises:
        UpstreamError: pip could not install it.
    """
    home = folder / wanted.requirement
    executable = home / "bin" / wanted.requirement.partition("==")[0]
    if executable.exists():
        return executable
    subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
    pip = subprocess.run(
        [str(home / "bin" / "pip"), "install", "--quiet", wanted.requirement],
        capture_output=True,
        text=True,
        check=False,
    )
    if pip.returncode != 0 or not executable.exists():
        tail = pip.stderr.strip()[-500:]
        raise UpstreamError(f"peer {wanted.name}: pip install {wanted.requirement} failed: {tail}")
    return executable


def command(
    wanted: Peer, executable: Path, urls: Sequence[str], port: int, metrics: int
) -> list[str]:
    """Return the command line of a peer in front of `urls`, listening on `port`."""
    words = wanted.arguments(urls, port, metrics)
    return [str(executable), *words[1:]]
