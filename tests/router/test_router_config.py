"""`router.yaml`, and what is said of one that does not fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vllm_workflow.core.config import PRESETS, PolicyConfig
from vllm_workflow.core.errors import ConfigError
from vllm_workflow.core.latency import LatencyModel
from vllm_workflow.profiles import catalogue
from vllm_workflow.router.config import RouterConfig

FULL = """
host: 0.0.0.0
port: 9000
policy: {dispatch: hexgen, alpha: 0.5, ordering: urgency}
max_body_mb: 8
set_priority: true
decision_log: log/decisions.jsonl
log_level: debug
shutdown_grace_s: 5
instances:
  - id: a100
    url: http://10.0.0.7:8000/
    gpu: A100-80G
    models: [llama]
    max_num_seqs: 64
    latency:
      overhead_ms: 2
      weights_ms: 20.5
      per_token_us: 90
      per_kv_token_us: 0.02
      max_num_batched_tokens: 4096
  - url: http://10.0.0.8:8000
workflows:
  - name: text2sql
    stages:
      - {name: generate, rounds: 1, prompt_tokens: 2000, output_tokens: 150}
      - {name: revise, rounds: 0.5}
"""


def config(**fields: Any) -> RouterConfig:
    data = {"instances": [{"url": "http://a:1"}], **fields}
    return RouterConfig.from_mapping(data, source="router.yaml")


def test_a_full_file_becomes_values_of_the_core(tmp_path: Path) -> None:
    path = tmp_path / "router.yaml"
    path.write_text(FULL)

    full = RouterConfig.from_file(path)

    a100, other = full.instances
    assert (a100.url, other.url, other.id) == (
        "http://10.0.0.7:8000",
        "http://10.0.0.8:8000",
        "10.0.0.8:8000",
    )
    assert a100.build().models == ("llama",)
    assert a100.build(["asked"]).models == ("llama",)
    assert other.build(["asked"]).models == ("asked",)
    assert a100.build().latency == LatencyModel(
        overhead_s=0.002,
        weights_s=0.0205,
        per_token_s=90 / 1e6,
        per_kv_token_s=0.02 / 1e6,
        max_num_batched_tokens=4096,
    )
    assert full.policy_config() == PolicyConfig(dispatch="hexgen", alpha=0.5, ordering="urgency")
    assert [s.name for s in full.workflows[0].build().stages] == ["generate", "revise"]
    assert full.decision_log == str(tmp_path / "log/decisions.jsonl")


def test_what_is_left_out_has_the_defaults_of_the_core() -> None:
    least = config()

    assert least.instances[0].build().latency == LatencyModel()
    assert least.policy == "workflow"
    assert least.policy_config() == PRESETS["workflow"]
    assert least.port == 8080


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_named(name: str) -> None:
    assert config(policy=name).policy_config() == PRESETS[name]


def test_a_combination_is_named_where_a_preset_is() -> None:
    assert config(policy="hexgen+urgency").policy_config() == PRESETS["hexgen"]


def test_a_policy_file_lies_beside_the_router_s(tmp_path: Path) -> None:
    (tmp_path / "policy.json").write_text(PolicyConfig(alpha=0.9).to_json())
    path = tmp_path / "router.yaml"
    path.write_text("policy: policy.json\ninstances: [{url: 'http://a:1'}]\n")

    assert RouterConfig.from_file(path).policy_config().alpha == 0.9


def test_flags_replace_fields_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "router.yaml"
    path.write_text(FULL)

    changed = RouterConfig.from_file(path, {"port": 1, "policy": "round-robin"})

    assert (changed.host, changed.port) == ("0.0.0.0", 1)
    assert changed.policy_config().dispatch == "round-robin"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"instances": []}, "instances: expected at least one"),
        ({"instances": [{}]}, "instances.0.url: expected a value, got none"),
        ({"ports": 1}, "ports: unknown field"),
        ({"policy": 3}, "policy: expected a name or a mapping of fields, got 3$"),
        ({"instances": [{"url": "foo"}]}, "instances.0.url: expected http://HOST:PORT.*'foo'$"),
        (
            {"instances": [{"url": "http://a:1", "gpus": 1}]},
            "instances.0.gpus: unknown",
        ),
        ({"colour": 1}, r"colour: unknown field; known fields are \['admin', 'auth', "),
        (
            {"discovery": {"files": [{"path": "x", "pat": "x"}]}},
            r"discovery.files.0.pat: unknown field; known fields are \['every_s', 'path'\]",
        ),
        ({"port": 70000}, "port: expected at most 65535, got 70000"),
        ({"port": "8000"}, "port: expected an integer, got '8000'"),
        ({"max_body_mb": 0}, "max_body_mb: expected more than 0, got 0"),
        (
            {"instances": [{"url": "10.0.0.7:8000"}]},
            "instances.0.url: expected http://HOST:PORT or https://HOST:PORT, got '10.0.0.7:8000'",
        ),
        (
            {"instances": [{"url": "http://a:1/v1"}]},
            "instances.0.url: expected the root of the server, without /v1, got 'http://a:1/v1'",
        ),
        (
            {"instances": [{"url": "http://a:1", "latency": {"weights": 1}}]},
            "instances.0.latency.weights: unknown field",
        ),
        (
            {"instances": [{"url": "http://a:1", "latency": {"weights_ms": -1}}]},
            "instances.0.latency.weights_ms: expected at least 0, got -1",
        ),
        (
            {"instances": [{"url": "http://a:1", "latency": {"weights_ms": 0, "overhead_ms": 0}}]},
            "instances.0: latency: overhead_s and weights_s are both 0",
        ),
        (
            {"instances": [{"url": "http://a:1", "id": "a b"}]},
            "instances.0.id: expected a name that fits ",
        ),
        (
            {"instances": [{"url": "http://a:1"}, {"url": "http://a:1"}]},
            r"instances: declared twice: \['a:1'\]",
        ),
        ({"policy": "fast"}, r"policy: unknown policy 'fast'; known are \['hexgen', "),
        ({"policy": "fast+fcfs"}, r"policy: policy 'fast\+fcfs': unknown dispatch 'fast'; known"),
        ({"policy": {"alfa": 1}}, "policy: unknown field 'alfa'; known fields are"),
        ({"policy": "none.json"}, r"none\.json: cannot read policy"),
        (
            {"workflows": [{"name": "w", "stages": [{"name": "s", "rounds": -1}]}]},
            "workflows.0.stages.0.rounds: expected at least 0, got -1",
        ),
        (
            {"workflows": [{"name": "w", "stages": [{"name": "s"}, {"name": "s"}]}]},
            "workflows.0: workflow 'w': a stage is declared twice",
        ),
        ({"log_level": "loud"}, "log_level: expected 'debug', 'info'"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_mistake_is_told_with_the_path_to_its_field(fields: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"^router\.yaml: {message}"):
        config(**fields)


def test_every_mistake_is_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        config(port=-1, hosts="x")

    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"router\.yaml: expected a mapping of fields, got None"),
        ("- a", r"router\.yaml: expected a mapping of fields, got \['a'\]"),
        ("a: [", r"router\.yaml: not YAML: "),
    ],
)
def test_a_file_that_is_no_configuration_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "router.yaml"
    path.write_text(text)

    with pytest.raises(ConfigError, match=message):
        RouterConfig.from_file(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"router\.yaml: cannot read: .*No such file"):
        RouterConfig.from_file(tmp_path / "router.yaml")


def latency_of(**fields: Any) -> LatencyModel:
    (one,) = config(instances=[{"url": "http://a:1", **fields}]).instances
    return one.build().latency


def test_gpu_and_shape_predict_the_latency() -> None:
    expected = catalogue.deployment("A100-80G", "llama-3.1-70b", tp=4, weight_bits=8).latency()

    assert latency_of(gpu="A100-80G", model_shape="llama-3.1-70b", tp=4, weight_bits=8) == expected


def test_what_latency_sets_goes_before_what_is_predicted() -> None:
    predicted = latency_of(gpu="L4", model_shape="llama-3.1-8b")
    changed = latency_of(
        gpu="L4", model_shape="llama-3.1-8b", latency={"max_num_batched_tokens": 512}
    )

    assert changed == replace(predicted, max_num_batched_tokens=512)


def test_a_gpu_beside_a_latency_is_for_people_only() -> None:
    found = latency_of(gpu="the old one in the cellar", latency={"overhead_ms": 7.0})

    assert found == replace(LatencyModel(), overhead_s=0.007)


@pytest.mark.parametrize(
    "other", ["http://a:1", "http://a:1/", "http://A:1", "http://a:01"], ids=str
)
def test_a_server_is_declared_once(other: str) -> None:
    message = r"instances: expected each server once, got http://.* as 'one' and as 'two'"
    with pytest.raises(ConfigError, match=message):
        config(instances=[{"id": "one", "url": "http://a:1"}, {"id": "two", "url": other}])


def test_a_port_that_cannot_be_is_told() -> None:
    with pytest.raises(ConfigError, match=r"instances\.0\.url: expected a PORT from 0 to 65535"):
        config(instances=[{"url": "http://a:70000"}])


def test_the_port_of_a_scheme_need_not_be_written() -> None:
    plain, secure = {"id": "one", "url": "http://a"}, {"id": "two", "url": "https://a"}
    assert len(config(instances=[plain, secure]).instances) == 2
    with pytest.raises(ConfigError, match="each server once"):
        config(instances=[plain, {"id": "two", "url": "http://a:80"}])


def test_a_profile_lies_beside_the_router_s_file(tmp_path: Path) -> None:
    profile = catalogue.profile("L4", "llama-3.1-8b")
    (tmp_path / "p.json").write_text(profile.to_json())
    path = tmp_path / "router.yaml"
    path.write_text("instances: [{url: 'http://a:1', profile: p.json}]\n")

    (one,) = RouterConfig.from_file(path).instances
    assert one.build().latency.weights_s == pytest.approx(profile.latency.weights_s, rel=1e-4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_shape": "llama-3.1-8b"}, "model_shape: expected gpu beside it, got none"),
        ({"gpu": "B300"}, "gpu: expected model_shape beside it, got none"),
        ({"gpu": "X1", "model_shape": "llama-3.1-8b"}, r"gpu: expected one of \[.*\], got 'X1'"),
        ({"gpu": "L4", "tp": 2}, "tp: expected model_shape beside it, got none"),
        ({"gpu": "L4", "model_shape": "llama-3.1-70b"}, "llama-3.1-70b at 16 bits: expected"),
        ({"profile": "none.json"}, r"none\.json: cannot read profile"),
    ],
    ids=str,
)
def test_hardware_that_cannot_be_is_told_with_its_instance(fields: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"^router\.yaml: instances\.0: {message}"):
        latency_of(**fields)


def test_a_key_that_is_given_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "router.yaml"
    path.write_text("port: 1\ninstances: [{url: 'http://a:1'}]\nport: 2\n")

    with pytest.raises(ConfigError, match=r"a key that was there already in line 3, column 1"):
        RouterConfig.from_file(path)


def test_a_mapping_may_start_from_another_one(tmp_path: Path) -> None:
    path = tmp_path / "router.yaml"
    path.write_text(
        "instances:\n- &first {url: 'http://a:1', max_num_seqs: 8}\n"
        "- {<<: *first, url: 'http://b:1'}\n"
    )

    config = RouterConfig.from_file(path)

    assert [(each.id, each.max_num_seqs) for each in config.instances] == [("a:1", 8), ("b:1", 8)]
