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
from statistics import fmean
from types import MappingProxyType
from typing import Any

from vllm_workflow.core.errors import ConfigError, UpstreamError
from vllm_workflow.core.latency import LatencyModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Front:
    """What a peer stands in front of, and where it listens."""

    urls: Sequence[str]
    """Roots of the servers."""
    latencies: Sequence[LatencyModel]
    """Step times of the servers by the wall clock: divided by `time_scale`."""
    port: int
    metrics_port: int
    time_scale: float = 1.0
    """The servers run so many times as fast as life."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """One router under one of its policies."""

    name: str
    requirement: str
    """As pip takes it; pinned, so that a figure can be made again."""
    arguments: Callable[[Front], list[str]]
    """Words of the command line behind the executable."""


def _vllm_router(
    policy: str, more: Callable[[Front], list[str]] = lambda front: []
) -> Callable[[Front], list[str]]:
    def words(front: Front) -> list[str]:
        return [
            *("--host", "127.0.0.1", "--port", str(front.port)),
            *("--worker-urls", *front.urls, "--policy", policy),
            *("--prometheus-host", "127.0.0.1", "--prometheus-port", str(front.metrics_port)),
            *("--worker-startup-check-interval", "1", "--queue-size", "10000"),
            *("--queue-timeout-secs", "3600", "--request-timeout-secs", "3600"),
            *("--max-concurrent-requests", "10000"),
            *more(front),
        ]

    return words


def _smg(policy: str) -> Callable[[Front], list[str]]:
    def words(front: Front) -> list[str]:
        return [
            *("launch", "--host", "127.0.0.1", "--port", str(front.port)),
            *("--worker-urls", *front.urls, "--policy", policy, "--backend", "vllm"),
            *("--prometheus-host", "127.0.0.1", "--prometheus-port", str(front.metrics_port)),
            *("--worker-startup-check-interval", "1", "--request-timeout-secs", "3600"),
            *("--max-concurrent-requests", "10000"),
        ]

    return words


def _program_scheduling(front: Front) -> list[str]:
    return [
        "--enable-program-scheduling",
        *("--program-scheduling-config-json", json.dumps(program_config(front))),
    ]


def program_config(front: Front) -> dict[str, Any]:
    """Return the configuration of vllm-router's Program scheduling for the servers.

    As its documentation asks, its cost models are calibrated to the servers. It has one set of
    coefficients for all, so they are means over the servers. Its default durations are taken for
    seconds of life. Programs are named by `X-Session-ID`, which stock vLLM ignores; it refuses
    calls with `vllm_xargs.agentic_context`.
    """
    latencies, scale = front.latencies, front.time_scale
    step_s = fmean(each.overhead_s + each.weights_s for each in latencies)
    token_s = fmean(each.per_token_s for each in latencies)
    decoding_s = fmean(each.per_token_below_knee_s + each.per_seq_s for each in latencies)
    return {
        "program_scheduling_enable_key": "auto",
        "global_queue": True,
        "queue_timeout_seconds": 3600.0,
        "metrics_interval_seconds": 1.0 / scale,
        "force_resume_timeout_seconds": 300.0 / scale,
        "paused_retention_ttl_seconds": 1800.0 / scale,
        "shared_prefix_freshness_warmup_seconds": 100.0 / scale,
        "max_acting_ttl_seconds": 10.0 / scale,
        "prefill_cost_model": {
            "intercept_seconds": step_s,
            "linear_seconds_per_1k_tokens": 1000 * token_s,
            "quadratic_seconds_per_1k_tokens_squared": 0.5e6
            * fmean(each.per_prefill_kv_token_s for each in latencies),
            "decode_throughput_alpha": 0.15,
        },
        "decode_throughput_model": {
            "fixed_step_seconds": step_s,
            "batch_step_seconds_per_request": decoding_s,
            "context_step_seconds_per_token": fmean(each.per_kv_token_s for each in latencies),
        },
    }


_VLLM_ROUTER = "vllm-router==0.1.17"
_SMG = "smg==1.13.0"

PEERS: Mapping[str, Peer] = MappingProxyType(
    {
        peer.name: peer
        for peer in (
            *(
                Peer(
                    name=f"vllm-router:{policy}",
                    requirement=_VLLM_ROUTER,
                    arguments=_vllm_router(policy),
                )
                for policy in ("round_robin", "consistent_hash", "cache_aware")
            ),
            Peer(
                name="vllm-router:program",
                requirement=_VLLM_ROUTER,
                arguments=_vllm_router("consistent_hash", _program_scheduling),
            ),
            Peer(name="smg:least_load", requirement=_SMG, arguments=_smg("least_load")),
        )
    }
)
"""By the name that `--policies` takes at level 3: `ROUTER:POLICY`."""
GROUP = "peers"
"""Means all of them."""


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


def command(wanted: Peer, executable: Path, front: Front) -> list[str]:
    """Return the command line of a peer."""
    return [str(executable), *wanted.arguments(front)]
