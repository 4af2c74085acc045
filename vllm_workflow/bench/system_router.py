"""Level 3: what stands in front of the servers, this project's router or somebody else's."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vllm_workflow.bench import peers
from vllm_workflow.bench.compare_policies import entries
from vllm_workflow.bench.identity import Identity
from vllm_workflow.bench.peers import PEERS, Front, Peer
from vllm_workflow.bench.system_fleet import (
    HOST,
    EmulatedFleet,
    free_ports,
    scaled_policy,
)
from vllm_workflow.cluster.process import ManagedProcess
from vllm_workflow.core.config import PolicyConfig
from vllm_workflow.core.errors import ConfigError
from vllm_workflow.core.latency import LatencyModel
from vllm_workflow.core.workflow import WorkflowProfile
from vllm_workflow.sim.scaling import scaled_latency

OWN_IDENTITY = Identity(headers=True)
PEER_IDENTITY = Identity(headers=False, session=True)
"""What other routers understand of runs: `X-Session-ID`, by vllm-router's documentation the
recommended way, for consistent hashing and for Program scheduling."""
_STOCK_ORDERING = "fcfs"
_ENGINE_FIELDS = (
    *("ordering", "patience_s", "starvation_ratio", "preempt", "urgent_slack_s"),
    *("preempt_margin_s", "preempt_cooldown_s", "preempt_waste_s", "late_patience_s"),
    "prefill_chunk_cap",
)
"""Of a policy; what only the router looks at makes no other servers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """One line of a comparison at level 3: a policy of ours, or a peer before stock vLLM."""

    name: str
    policy: PolicyConfig | None = None
    """None for a peer."""
    peer: Peer | None = None

    @property
    def engine_policy(self) -> PolicyConfig | None:
        """Of the servers; None for stock vLLM. Systems with equal ones share their servers."""
        if self.policy is None or self.policy.ordering == _STOCK_ORDERING:
            return None
        return PolicyConfig(**{name: getattr(self.policy, name) for name in _ENGINE_FIELDS})

    @property
    def fingerprint(self) -> str:
        """Of the policy, in seconds of life; of a peer, what was installed."""
        if self.policy is not None:
            return self.policy.fingerprint
        return self.peer.requirement if self.peer is not None else ""

    @property
    def identity(self) -> Identity:
        return OWN_IDENTITY if self.peer is None else PEER_IDENTITY


def systems(names: Sequence[str]) -> tuple[System, ...]:
    """Return what names mean, each once, in order.

    Args:
        names: As `compare_policies.entries` takes them, but no searches; names of peers;
            `peers` for all of these.

    Raises:
        ConfigError: An unknown name, or a search: each of its variants would need servers.
    """
    expanded = dict.fromkeys(
        each for name in names for each in (PEERS if name == peers.GROUP else (name,))
    )
    found: dict[str, System] = {}
    for name in expanded:
        if name in PEERS:
            found[name] = System(name=name, peer=PEERS[name])
            continue
        try:
            of_name = entries((name,))
        except ConfigError as e:
            raise ConfigError(f"{e}; at level 3 also {[peers.GROUP, *PEERS]}") from None
        for entry in of_name:
            if len(entry.variants) > 1:
                raise ConfigError(
                    f"--policies: {entry.name} searches among {len(entry.variants)} policies, "
                    "which level 3 cannot; name the policies themselves"
                )
            found[entry.name] = System(name=entry.name, policy=entry.variants[0].policy)
    return tuple(found.values())


def router_config(
    policy: PolicyConfig,
    fleet: EmulatedFleet,
    workflows: Sequence[WorkflowProfile],
    port: int,
) -> dict[str, Any]:
    """Return the content of `router.yaml` for this project's router before emulated servers.

    The router lives in the servers' time, that of the wall clock: what it is told of step times,
    and the durations of its policy, are divided by the servers' time scale.
    """
    scale = fleet.time_scale
    instances = []
    for each, url in zip(fleet.instances, fleet.urls, strict=True):
        instances.append(
            {
                "url": url,
                "id": each.instance_id,
                "max_num_seqs": each.spec.max_num_seqs,
                "num_kv_tokens": each.sim.instance.num_kv_tokens,
                "latency": _latency_fields(scaled_latency(each.sim.instance.latency, scale)),
            }
        )
    return {
        "host": HOST,
        "port": port,
        "policy": asdict(scaled_policy(policy, scale)),
        "instances": instances,
        "workflows": [_workflow_fields(workflow) for workflow in workflows],
        "log_level": "warning",
        "shutdown_grace_s": 1.0,
    }


def front_process(
    system: System,
    fleet: EmulatedFleet,
    workflows: Sequence[WorkflowProfile],
    *,
    peers_folder: Path,
    folder: Path,
) -> ManagedProcess:
    """Return the router of a system, not started yet.

    Args:
        system: Which.
        fleet: Running.
        workflows: Declared to this project's router; no peer can be told them.
        peers_folder: Where peers are installed, see `peers.installed`.
        folder: For its configuration and log.

    Raises:
        UpstreamError: A peer cannot be installed.
    """
    port, metrics_port = free_ports(2)
    file_name = re.sub(r"[^\w.+-]", "-", system.name)
    if system.peer is not None:
        latencies = [each.sim.instance.latency for each in fleet.instances]
        front = Front(
            urls=fleet.urls,
            latencies=[scaled_latency(each, fleet.time_scale) for each in latencies],
            port=port,
            metrics_port=metrics_port,
            time_scale=fleet.time_scale,
        )
        executable = peers.installed(system.peer, peers_folder)
        command = peers.command(system.peer, executable, front)
    else:
        assert system.policy is not None
        path = folder / f"{file_name}.router.yaml"
        data = router_config(system.policy, fleet, workflows, port)
        path.write_text(json.dumps(data, indent=1), encoding="utf-8")  # which is YAML
        command = [sys.executable, "-m", "vllm_workflow.cli.main", "router", "--config", str(path)]
    return ManagedProcess(
        name=system.name,
        command=command,
        url=f"http://{HOST}:{port}",
        log_path=folder / f"{file_name}.log",
    )


def _latency_fields(latency: LatencyModel) -> Mapping[str, Any]:
    fields: dict[str, Any] = {
        "overhead_ms": 1e3 * latency.overhead_s,
        "weights_ms": 1e3 * latency.weights_s,
        "per_token_us": 1e6 * latency.per_token_s,
        "per_token_below_knee_us": 1e6 * latency.per_token_below_knee_s,
        "per_seq_us": 1e6 * latency.per_seq_s,
        "per_kv_token_us": 1e6 * latency.per_kv_token_s,
        "per_prefill_kv_token_us": 1e6 * latency.per_prefill_kv_token_s,
        "max_num_batched_tokens": latency.max_num_batched_tokens,
    }
    if latency.num_knee_tokens is not None:
        fields["num_knee_tokens"] = latency.num_knee_tokens
    return fields


def _workflow_fields(workflow: WorkflowProfile) -> dict[str, Any]:
    stages = [
        {
            "name": stage.name,
            "rounds": stage.rounds,
            "prompt_tokens": stage.prompt_tokens,
            "output_tokens": stage.output_tokens,
        }
        for stage in workflow.stages
    ]
    return {"name": workflow.name, "stages": stages}
