from __future__ import annotations

import json
from pathlib import Path

import pytest

from vllm_workflow.bench.compare import Options
from vllm_workflow.bench.identity import CallContext
from vllm_workflow.bench.peers import PEERS, Front, command, peer
from vllm_workflow.bench.system_fleet import EmulatedFleet, emulated_instances
from vllm_workflow.bench.system_router import router_config, systems
from vllm_workflow.core.errors import ConfigError
from vllm_workflow.core.latency import LatencyModel
from vllm_workflow.router.config import RouterConfig
from vllm_workflow.sim.declare import declared
from vllm_workflow.sim.scaling import scaled_latency
from vllm_workflow.sim.workloads import load

SETUP = Options().setup
URLS = [f"http://127.0.0.1:{port}" for port in (1001, 1002, 1003, 1004)]
FRONT = Front(
    urls=URLS,
    latencies=[LatencyModel(overhead_s=0.01, weights_s=0.03), LatencyModel(weights_s=0.05)],
    port=2000,
    metrics_port=2001,
    time_scale=4.0,
)


class Running(EmulatedFleet):
    """Instances that somebody else has started."""

    @property
    def urls(self) -> list[str]:
        return URLS


def config_of(name: str, time_scale: float = 4.0) -> RouterConfig:
    fleet = Running(emulated_instances(SETUP), None, time_scale=time_scale, folder=Path())
    policy = systems([name])[0].policy
    assert policy is not None
    workflows = declared(load("builtin:chess", 3, 0).runs)
    return RouterConfig.from_mapping(
        json.loads(json.dumps(router_config(policy, fleet, workflows, 2000))), source="test"
    )


def test_the_router_predicts_in_the_time_of_the_servers() -> None:
    config = config_of("workflow")

    for entry, each in zip(config.instances, emulated_instances(SETUP), strict=True):
        built = entry.build(models=("m",))
        wanted = scaled_latency(each.sim.instance.latency, 4.0)
        assert built.instance_id == each.instance_id
        assert built.num_kv_tokens == each.sim.instance.num_kv_tokens
        assert built.max_num_seqs == each.sim.instance.max_num_seqs
        assert built.latency.step_s(num_prefill_tokens=500, num_decode_seqs=9) == pytest.approx(
            wanted.step_s(num_prefill_tokens=500, num_decode_seqs=9)
        )
    assert config.policy_config().patience_s == pytest.approx(60.0 / 4.0)


def test_the_router_is_told_the_workflows_that_a_simulation_declares() -> None:
    (workflow,) = config_of("workflow").workflows

    assert workflow.build() == declared(load("builtin:chess", 3, 0).runs)[0]


def test_peers_and_first_come_first_served_share_stock_servers() -> None:
    found = systems(["peers", "round-robin+fcfs", "least-outstanding"])

    assert len(found) == len(PEERS) + 2
    assert {each.engine_policy for each in found} == {None}


def test_policies_that_differ_in_the_router_only_share_servers_and_orderings_do_not() -> None:
    hexgen, round_robin, workflow, early = systems(
        ["hexgen", "round-robin+urgency", "workflow", "predicted-finish+slack"]
    )

    assert hexgen.engine_policy == round_robin.engine_policy
    assert workflow.policy != early.policy
    assert workflow.engine_policy == early.engine_policy
    assert workflow.engine_policy not in {None, hexgen.engine_policy}


def test_a_search_is_refused_and_an_unknown_name_is_told_what_is_known() -> None:
    with pytest.raises(ConfigError, match="clairvoyant searches among 14 policies"):
        systems(["clairvoyant"])
    with pytest.raises(ConfigError, match=r"vllm-router:random.*vllm-router:cache_aware"):
        systems(["vllm-router:random"])


def test_peers_are_told_of_runs_by_session_and_our_router_by_its_own_headers() -> None:
    ours, other = systems(["workflow", "smg:least_load"])
    run = load("builtin:chess", 1, 0).runs[0]
    context = CallContext(run=run, call=run.calls[0], workflow_id="w", slo_s=9.0, budget_s=8.0)

    assert other.identity.to_headers(context).keys() == {"X-Request-Id", "X-Session-ID"}
    assert other.identity.to_headers(context)["X-Session-ID"] == "w"
    assert other.identity.to_xargs(context) == {}
    assert ours.identity.to_headers(context)["X-Workflow-Slo-Ms"] == "9000"
    assert "X-Session-ID" not in ours.identity.to_headers(context)


@pytest.mark.parametrize("name", sorted(PEERS))
def test_a_peer_stands_before_all_servers_on_loopback(name: str) -> None:
    words = command(peer(name), Path("/peers/bin/router"), FRONT)
    after = words.index("--worker-urls")

    assert words[0] == "/peers/bin/router"
    assert words[after + 1 : after + 1 + len(URLS)] == URLS
    assert words[words.index("--host") + 1] == "127.0.0.1"
    assert words[words.index("--port") + 1] == "2000"
    assert words[words.index("--prometheus-port") + 1] == "2001"


def test_program_scheduling_is_calibrated_to_the_servers_as_its_documentation_asks() -> None:
    words = command(peer("vllm-router:program"), Path("r"), FRONT)
    config = json.loads(words[words.index("--program-scheduling-config-json") + 1])

    assert "--enable-program-scheduling" in words
    assert config["program_scheduling_enable_key"] == "auto"
    assert config["decode_throughput_model"]["fixed_step_seconds"] == pytest.approx(0.046)
    assert config["max_acting_ttl_seconds"] == 2.5
    assert len(config["prefill_cost_model"]) + len(config["decode_throughput_model"]) == 7
