"""GPUs, shapes and profiles as data: known ones work, wrong ones are named."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_workflow.core.errors import ConfigError
from vllm_workflow.core.hardware import WEIGHT_BITS
from vllm_workflow.core.latency import LatencyModel
from vllm_workflow.profiles import catalogue
from vllm_workflow.profiles.profile import LatencyProfile

GPUS = ["A100-40G", "A100-80G", "A6000", "A40", "L40", "L40S"]
GPUS += ["L4", "A10G", "H100", "H200", "B200", "RTX4090"]


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("shape", ["llama-3.1-8b", "qwen2.5-32b"])
def test_every_gpu_has_a_prior_for_every_shape(gpu: str, shape: str) -> None:
    alone = catalogue.deployment(gpu, shape).latency()
    halved = catalogue.deployment(gpu, shape, tp=2).latency()

    assert alone.step_s(num_decode_seqs=1) > 0.003
    assert halved.weights_s == pytest.approx(alone.weights_s / 2)
    assert halved.overhead_s > alone.overhead_s


@pytest.mark.parametrize(
    ("gpu", "least_ms", "most_ms"),
    [("A100-80G", 10.5, 12), ("H100", 6, 7), ("L40S", 21, 24), ("A6000", 24, 27), ("L4", 60, 67)],
)
def test_a_lone_token_of_llama_8b_takes_what_was_published(
    gpu: str, least_ms: float, most_ms: float
) -> None:
    step_s = catalogue.deployment(gpu, "llama-3.1-8b").latency().step_s(num_decode_seqs=1)

    assert least_ms < 1e3 * step_s < most_ms


@pytest.mark.parametrize(
    ("shape", "billions"),
    [("llama-3.1-8b", 8.03), ("llama-3.1-70b", 70.55), ("llama-3.2-1b", 1.24), ("qwen2.5-7b", 7.6)],
)
def test_a_shape_has_as_many_parameters_as_its_model(shape: str, billions: float) -> None:
    weight_bytes = catalogue.deployment("H200", shape).weight_bytes

    assert weight_bytes / 2e9 == pytest.approx(billions, rel=0.01)


def test_kv_blocks_of_a_24_gib_card_are_those_that_vllm_found() -> None:
    num_blocks = catalogue.deployment("RTX4090", "llama-3.1-8b").num_kv_blocks()

    assert num_blocks == pytest.approx(2588, rel=0.05)


def test_more_gpus_and_fewer_bits_leave_more_room() -> None:
    one, two = (catalogue.deployment("H100", "llama-3.1-8b", tp=n) for n in (1, 2))
    narrow = replace(one, weight_bits=8)

    assert two.num_kv_blocks() > 2 * one.num_kv_blocks()
    assert narrow.num_kv_blocks() > one.num_kv_blocks()
    assert narrow.latency().weights_s < one.latency().weights_s


def test_weights_that_do_not_fit_are_told_with_a_way_out() -> None:
    with pytest.raises(
        ConfigError,
        match=r"llama-3.1-70b at 16 bits: expected weights below 70.1 GiB on each of 1 × A100-80G, "
        r"got 131.4 GiB; raise tp or lower weight_bits",
    ):
        catalogue.profile("A100", "llama-3.1-70b")


@given(
    gpu=st.sampled_from(catalogue.gpu_names()),
    shape=st.sampled_from(catalogue.shape_names()),
    tp=st.sampled_from([1, 2]),
    weight_bits=st.sampled_from(WEIGHT_BITS),
    more=st.integers(1, 10_000),
)
def test_every_prior_is_a_model_that_more_context_slows(
    gpu: str, shape: str, tp: int, weight_bits: int, more: int
) -> None:
    latency = catalogue.deployment(gpu, shape, tp=tp, weight_bits=weight_bits).latency()

    assert latency.step_s(num_kv_tokens=more) > latency.step_s() > 0.0
    assert 10 < latency.knee_tokens < 2000


@pytest.mark.parametrize(
    ("spelling", "name"),
    [("A100", "A100-80G"), ("a100 80gb", "A100-80G"), ("NVIDIA H200", "H200"), ("4090", "RTX4090")],
)
def test_a_gpu_has_several_spellings(spelling: str, name: str) -> None:
    assert catalogue.gpu(spelling).name == name


def test_a_model_is_known_by_its_name_on_hugging_face() -> None:
    assert catalogue.shape("meta-llama/Llama-3.1-8B-Instruct").name == "llama-3.1-8b"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (("TPU", "llama-3.1-8b"), r"gpu: expected one of \['A100-40G', .*\], got 'TPU'"),
        (("L4", "gpt-5"), r"model_shape: expected one of \[.*\], got 'gpt-5'"),
    ],
)
def test_an_unknown_name_is_told_with_those_that_are_known(
    values: tuple[str, str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        catalogue.profile(*values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tp": 3}, "tp: expected a divisor of the 32 attention heads of llama-3.1-8b, got 3"),
        ({"tp": 0}, "tp: expected a divisor"),
        ({"weight_bits": 5}, r"weight_bits: expected one of \(4, 8, 16\), got 5"),
    ],
)
def test_a_deployment_that_cannot_be_is_refused(values: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        catalogue.deployment("L4", "llama-3.1-8b", **values)


def test_a_measured_profile_goes_before_the_prior() -> None:
    measured = catalogue.profile("H100", "llama-3.1-70b", tp=4, weight_bits=8)
    prior = catalogue.prior(catalogue.deployment("H100", "llama-3.1-70b", tp=4, weight_bits=8))
    other = catalogue.profile("H100", "llama-3.1-70b", tp=4)

    assert measured.source.startswith("TPOT of vLLM published by InferenceX")
    assert measured.latency != prior.latency
    assert other.source.startswith("prior: datasheet")


def test_the_token_budget_is_the_server_s_not_the_profile_s() -> None:
    found = catalogue.profile("L4", "llama-3.2-1b", max_num_batched_tokens=512)

    assert found.latency.max_num_batched_tokens == 512


def test_a_profile_file_reads_back_what_was_written(tmp_path: Path) -> None:
    profile = catalogue.profile("L4", "llama-3.2-3b")
    path = tmp_path / "p.json"
    path.write_text(profile.to_json())
    read = LatencyProfile.from_file(path)

    assert read.to_json() == profile.to_json()
    assert read.num_kv_tokens == profile.num_kv_tokens
    assert read.latency.weights_s == pytest.approx(profile.latency.weights_s, rel=1e-4)


def test_blocks_that_are_not_known_are_no_tokens() -> None:
    assert LatencyProfile(latency=LatencyModel()).num_kv_tokens is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"latency": {"weights_ms": -1}}, "latency.weights_ms: expected a number from 0, got -1"),
        ({"latency": {"weights_ms": "1"}}, "latency.weights_ms: expected a number from 0, got '1'"),
        ({"latency": {"weight_ms": 1}}, r"unknown field 'latency.weight_ms'; known fields are"),
        (
            {"latency": {"max_num_batched_tokens": 1.5}},
            "latency.max_num_batched_tokens: expected an integer from 0, got 1.5",
        ),
        ({"latency": {"weights_ms": 0, "overhead_ms": 0}}, "latency: overhead_s and weights_s"),
        ({"latency": []}, r"latency: expected dict, got \[\]"),
        ({"latency": None}, "latency: expected dict, got None"),
        ({"gpus": "x"}, r"unknown field 'gpus'; known fields are \['block_size'"),
        ({"tp": "2"}, "tp: expected int, got '2'"),
        ({"num_kv_blocks": -1}, "num_kv_blocks: expected a number from 0, got -1"),
        ({"num_kv_blocks": 1.5}, "num_kv_blocks: expected int or null, got 1.5"),
        ({"schema_version": 2}, "schema_version: expected 1, got 2"),
    ],
    ids=str,
)
def test_a_profile_s_mistake_is_told_with_file_and_field(
    tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    path = tmp_path / "p.json"
    path.write_text(json.dumps({"schema_version": 1, "source": "s", "latency": {}} | fields))

    with pytest.raises(ConfigError, match=rf"p\.json: {message}"):
        LatencyProfile.from_file(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not JSON"), ("[]", "expected an object of fields"), ("{}", "schema_version: missing")],
)
def test_a_file_that_is_no_profile_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "p.json"
    path.write_text(text)

    with pytest.raises(ConfigError, match=rf"p\.json: {message}"):
        LatencyProfile.from_file(path)
