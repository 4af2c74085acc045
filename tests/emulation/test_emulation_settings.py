import os
from pathlib import Path

import pytest

from vllm_workflow.core.errors import ConfigError
from vllm_workflow.emulation.settings import (
    PROFILE_UTILIZATION,
    SETTINGS_ENV,
    EmulationSettings,
)
from vllm_workflow.profiles import catalogue

ARGV = ["serve", "MODEL", "--emulate-gpu", "A100-80G", "--emulate-model-shape", "llama-3.1-70b"]


def settings(*more: str) -> EmulationSettings:
    found = EmulationSettings.from_argv([*ARGV, *more])
    assert found is not None
    return found


@pytest.mark.parametrize(
    "argv",
    [
        ["--port", "8000", "--emulate-gpu", "H100", "--max-model-len", "10"],
        ["--emulate-gpu=H100", "--emulate-gpus=x"],
        ["serve", "m", "--emulate_gpu", "H100"],
        ["--emulate_gpu=H100"],
    ],
)
def test_the_flag_is_found_in_any_form(argv: list[str]) -> None:
    assert EmulationSettings.from_argv(argv) == EmulationSettings(gpu="H100")


@pytest.mark.parametrize(
    "argv",
    [
        *([], ["serve", "emulate-gpu"], ["--emulate-tp", "2"], ["--emulate-gpu"]),
        ["--emulate-g", "H100"],
    ],
)
def test_without_the_flag_and_its_value_there_is_nothing(argv: list[str]) -> None:
    assert EmulationSettings.from_argv(argv) is None


def test_children_find_what_their_parent_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SETTINGS_ENV, "")
    assert EmulationSettings.from_environment() is None
    found = settings("--emulate-tp", "2", "--emulate-time-scale", "4")

    found.to_environment(os.environ)

    assert EmulationSettings.from_environment() == found


def test_the_profile_is_that_of_the_catalogue() -> None:
    found = settings("--emulate-weight-bits", "4")

    assert found.profile == catalogue.profile("A100-80G", "llama-3.1-70b", weight_bits=4)
    assert found.num_kv_tokens(PROFILE_UTILIZATION) == found.profile.num_kv_tokens


def test_less_memory_means_fewer_kv_tokens() -> None:
    found = settings("--emulate-weight-bits=4")
    deployment = catalogue.deployment("A100-80G", "llama-3.1-70b", weight_bits=4)

    num_tokens = found.num_kv_tokens(0.6)

    assert num_tokens == 16 * deployment.num_kv_blocks(gpu_memory_utilization=0.6)
    assert num_tokens < found.num_kv_tokens(PROFILE_UTILIZATION)


def test_a_profile_file_says_all_of_it(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    profile = catalogue.profile("L40S", "llama-3.1-8b")
    path.write_text(profile.to_json(), encoding="utf-8")

    found = EmulationSettings(gpu=str(path))
    found.check()

    assert found.profile.num_kv_tokens == profile.num_kv_tokens
    assert found.device == catalogue.gpu("L40S")
    with pytest.raises(ConfigError, match="--emulate-weight-bits: expected only beside the name"):
        EmulationSettings(gpu=str(path), weight_bits="4").check()


def test_a_profile_of_an_unknown_gpu_needs_kv_blocks_and_the_default_memory(
    tmp_path: Path,
) -> None:
    path = tmp_path / "profile.json"
    text = '{"schema_version": 1, "source": "me", "latency": {"weights_ms": 9}%s}'
    path.write_text(text % ', "num_kv_blocks": 500, "block_size": 16', encoding="utf-8")

    found = EmulationSettings(gpu=str(path))
    found.check()

    assert (found.num_kv_tokens(PROFILE_UTILIZATION), found.device) == (8000, None)
    with pytest.raises(ConfigError, match=r"no --gpu-memory-utilization"):
        found.num_kv_tokens(0.5)
    path.write_text(text % "", encoding="utf-8")
    with pytest.raises(ConfigError, match="the profile has none"):
        EmulationSettings(gpu=str(path)).check()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--emulate-gpu=A1000", "gpu: expected one of"),
        ("--emulate-gpu=none.json", "none.json: cannot read profile"),
        ("--emulate-model-shape=llama", "model_shape: expected one of"),
        ("--emulate-weight-bits=5", r"--emulate-weight-bits: expected one of \(4, 8, 16\), got"),
        ("--emulate-weight-bits=16", "expected weights below"),
        ("--emulate-tp=0", "--emulate-tp: expected a whole number from 1, got '0'"),
        ("--emulate-tp=two", "--emulate-tp: expected a whole number from 1, got 'two'"),
        ("--emulate-time-scale=0", "--emulate-time-scale: expected a number above 0, got '0'"),
        ("--emulate-time-scale=nan", "--emulate-time-scale: expected a number above 0"),
        ("--emulate-time-scale=fast", "--emulate-time-scale: expected a number above 0"),
    ],
)
def test_what_makes_no_gpu_is_refused_by_flag(more: str, message: str) -> None:
    argv = [*ARGV, "--emulate-weight-bits=4", more]
    if "none.json" in more:
        argv = [more]
    found = EmulationSettings.from_argv(argv)
    assert found is not None

    with pytest.raises(ConfigError, match=message):
        found.check()


def test_a_gpu_by_name_needs_a_model_shape() -> None:
    with pytest.raises(ConfigError, match="--emulate-model-shape: missing beside --emulate-gpu"):
        EmulationSettings(gpu="H100").check()
