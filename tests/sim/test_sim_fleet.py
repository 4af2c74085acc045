"""A fleet is named as one would say it, and what cannot be is one clear error."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_workflow.core.errors import ConfigError
from vllm_workflow.profiles import catalogue
from vllm_workflow.sim.fleet import fleet_of


def test_text_names_gpus_and_counts() -> None:
    fleet = fleet_of("A100:2,A6000:1,L40S")

    assert [i.instance.instance_id for i in fleet] == ["a100-0", "a100-1", "a6000-0", "l40s-0"]
    assert fleet[0].latency == catalogue.profile("A100", "llama-3.1-8b").latency
    assert fleet[0].num_kv_blocks > fleet[2].num_kv_blocks > fleet[3].num_kv_blocks * 0.9


def test_model_and_its_deployment_apply_to_all() -> None:
    (one,) = fleet_of("H100:1", model_shape="llama-3.1-70b", tp=4, weight_bits=8)

    wanted = catalogue.profile(
        "H100", "llama-3.1-70b", tp=4, weight_bits=8, max_num_batched_tokens=2048
    )
    assert one.latency == wanted.latency


def test_router_knows_the_room_in_the_kv_cache_but_for_the_block_vllm_keeps() -> None:
    (one,) = fleet_of("L4:1")

    assert one.instance.num_kv_tokens == (one.num_kv_blocks - 1) * one.block_size


def test_file_sets_what_an_instance_was_started_with(tmp_path: Path) -> None:
    path = tmp_path / "fleet.yaml"
    path.write_text(
        "- {gpu: A100, count: 2, max_num_seqs: 8, num_kv_blocks: 500}\n"
        "- {gpu: L40S, max_num_batched_tokens: 512, gpu_memory_utilization: 0.5}\n"
    )

    fleet = fleet_of(str(path))

    assert [i.instance.max_num_seqs for i in fleet] == [8, 8, 128]
    assert [i.num_kv_blocks for i in fleet[:2]] == [500, 500]
    assert fleet[2].latency.max_num_batched_tokens == 512
    assert fleet[2].num_kv_blocks < fleet_of("L40S")[0].num_kv_blocks


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ("A100:0", "count: expected an integer from 1"),
        ("A100:-1", "expected GPU:COUNT"),
        ("A100:two", "expected GPU:COUNT"),
        ("A100:1,,L40S:1", "expected GPU:COUNT"),
        ("", "expected GPU:COUNT"),
        ("B9000:1", "gpu: expected one of"),
        ("missing.yaml", "cannot read fleet"),
    ],
)
def test_fleet_that_makes_no_sense_is_an_error(spec: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        fleet_of(spec)


def test_model_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(ConfigError, match="expected weights below"):
        fleet_of("L40S:1", model_shape="llama-3.1-70b")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[]", "expected a list of instances"),
        ("gpu: A100", "expected a list of instances"),
        ("- A100", "expected a mapping with `gpu`"),
        ("- {gpu: A100, cuont: 2}", "unknown field 'cuont'"),
        ("- {gpu: A100, count: two}", "count: expected int, got 'two'"),
        ("- {gpu: A100, count: true}", "count: expected int, got True"),
        ("- {gpu: A100, gpu_memory_utilization: 1.5}", "gpu_memory_utilization: expected a share"),
        ("- {gpu: A100, num_kv_blocks: 0}", "num_kv_blocks: expected an integer from 1"),
        ("- {gpu: [", "cannot read fleet"),
    ],
)
def test_fleet_file_that_makes_no_sense_is_an_error(
    tmp_path: Path, text: str, complaint: str
) -> None:
    path = tmp_path / "fleet.yaml"
    path.write_text(text)

    with pytest.raises(ConfigError, match=complaint):
        fleet_of(str(path))
