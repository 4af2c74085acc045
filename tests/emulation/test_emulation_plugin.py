"""The flags in vLLM's parser, and what they make of its platform.

Where that matters the process is a fresh one; each takes seconds to import vLLM.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from vllm import platforms
from vllm.config import CacheConfig
from vllm.engine import arg_utils
from vllm.exceptions import VLLMValidationError
from vllm.platforms.cpu import CpuPlatform
from vllm.sampling_params import SamplingParams

from vllm_workflow import vllm_metrics
from vllm_workflow.core.errors import ConfigError
from vllm_workflow.emulation import compat, plugin
from vllm_workflow.emulation.platform import EmulatedGpuPlatform
from vllm_workflow.emulation.settings import SETTINGS_ENV, EmulationSettings

GPU = ["--emulate-gpu", "A100-80G", "--emulate-model-shape", "llama-3.1-8b"]
Parse = Callable[..., argparse.Namespace]


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch) -> Parse:
    """Parse a command line as the first process of a server does."""

    class EngineArgs:
        @staticmethod
        def add_cli_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
            parser.add_argument("--tensor-parallel-size", default=1)
            return parser

    monkeypatch.setattr(arg_utils, "EngineArgs", EngineArgs)
    monkeypatch.setattr(vllm_metrics, "serve_from_this_process", lambda: None)
    monkeypatch.setenv(SETTINGS_ENV, "")

    def parse(*argv: str, platform_is_asked_for: bool = True) -> argparse.Namespace:
        monkeypatch.setattr(sys, "argv", ["vllm", *argv])
        chosen = plugin.platform() if platform_is_asked_for else None
        platform = EmulatedGpuPlatform() if chosen else CpuPlatform()
        monkeypatch.setattr(platforms, "_current_platform", platform)
        plugin.register()
        plugin.register()
        return EngineArgs.add_cli_args(argparse.ArgumentParser()).parse_args(argv)

    return parse


def test_the_flags_are_read_whatever_their_order(parse: Parse) -> None:
    parse("--emulate-time-scale=2", *GPU, "--tensor-parallel-size", "1")

    assert EmulationSettings.from_environment() == EmulationSettings(
        gpu="A100-80G", model_shape="llama-3.1-8b", time_scale="2"
    )


def test_without_the_flag_there_is_no_platform_and_nothing_in_the_environment(
    parse: Parse,
) -> None:
    parse("--tensor-parallel-size", "1")

    assert plugin.platform() is None
    assert not os.environ[SETTINGS_ENV]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--emulate-tp", "2"], "argument --emulate-tp: only together with --emulate-gpu"),
        (["--emulate-gpu", "A100-80G"], "--emulate-model-shape: missing beside --emulate-gpu"),
        (["--emulate-gpu", "A1000", *GPU[2:]], "gpu: expected one of"),
        ([*GPU, "--emulate-time-scale", "0"], "--emulate-time-scale: expected a number above 0"),
        (["--emulate-gpu"], "argument --emulate-gpu: expected one argument"),
    ],
)
def test_what_makes_no_gpu_is_refused_before_anything_starts(
    parse: Parse, capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    with pytest.raises(SystemExit):
        parse(*argv)

    assert message in capsys.readouterr().err


def test_where_vllm_has_another_platform_the_flag_is_refused(
    parse: Parse, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(*GPU, platform_is_asked_for=False)

    message = capsys.readouterr().err
    assert "not in a --config file" in message
    assert "VLLM_TARGET_DEVICE=cpu" in message


def test_a_name_that_vllm_does_not_have_is_reported_with_its_version(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compat.check()
    monkeypatch.delattr(SamplingParams, "eos_token_id")

    with pytest.raises(
        ConfigError, match=r"--emulate-gpu: vLLM 0\.\S+ has no SamplingParams.eos_token_id"
    ):
        compat.check()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tensor_parallel_size": 2}, "--tensor-parallel-size cannot .* --emulate-tp emulates"),
        ({"pipeline_parallel_size": 2}, "--pipeline-parallel-size cannot be emulated"),
        ({"speculative_config": object()}, "--speculative-config cannot be emulated"),
        ({"lora_config": object()}, "--enable-lora cannot be emulated"),
        ({"kv_transfer_config": object()}, "--kv-transfer-config cannot be emulated"),
        ({"runner_type": "pooling"}, "--runner cannot be emulated; only generation is"),
    ],
)
def test_what_cannot_be_emulated_is_refused_by_flag(changed: dict[str, Any], message: str) -> None:
    values = {
        **{"tensor_parallel_size": 1, "pipeline_parallel_size": 1, "runner_type": "generate"},
        **dict.fromkeys(("speculative_config", "lora_config", "kv_transfer_config")),
        **changed,
    }
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(**values),
        model_config=SimpleNamespace(**values),
        **{name: values[name] for name in values if name.endswith("config")},
    )

    with pytest.raises(ConfigError, match=message):
        compat.check_config(config)


def test_probabilities_are_refused() -> None:
    EmulatedGpuPlatform.validate_request(None, SamplingParams())

    for params in (SamplingParams(logprobs=1), SamplingParams(prompt_logprobs=0)):
        with pytest.raises(
            VLLMValidationError, match=r"an emulated GPU .* computes no probabilities"
        ):
            EmulatedGpuPlatform.validate_request(None, params)


SERVE = """
import json, os, subprocess, sys
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.usage.usage_lib import UsageContext
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
engine_args = AsyncEngineArgs.from_cli_args(parser.parse_args(["--model", ".", *sys.argv[1:]]))
from vllm.platforms import current_platform
tokens, seqs = engine_args.get_batch_defaults(1)
child = "from vllm.platforms import current_platform as p; print(type(p).__name__)"
print(json.dumps({
    "platform": type(current_platform).__name__,
    "child": subprocess.run(
        [sys.executable, "-W", "ignore", "-c", child], capture_output=True, text=True
    ).stdout.split()[-1],
    "utilization": engine_args.gpu_memory_utilization,
    "limits": [x[UsageContext.OPENAI_API_SERVER] for x in (tokens, seqs)],
    "scheduler": engine_args.scheduler_cls,
    "environment": sorted(k for k in os.environ if "VLLM_WORKFLOW" in k),
}))
"""


def run_python(code: str, *argv: str, **environment: str) -> Any:
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *argv],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, **environment},
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.slow
def test_without_the_flag_vllm_is_as_if_this_were_not_installed() -> None:
    seen = run_python(SERVE)

    assert seen["platform"] == "CpuPlatform"
    assert seen["child"] == "CpuPlatform"
    assert seen["utilization"] == CacheConfig.gpu_memory_utilization
    assert seen["environment"] == []


@pytest.mark.slow
def test_with_the_flag_vllm_sees_that_gpu_in_all_processes() -> None:
    argv = ["--emulate_gpu=H100", "--emulate-model-shape", "llama-3.1-8b"]

    seen = run_python(SERVE, "--scheduler", "workflow", *argv)

    assert seen == {
        "platform": "EmulatedGpuPlatform",
        "child": "EmulatedGpuPlatform",
        "utilization": 0.9,
        "limits": [8192, 1024],  # vLLM's own defaults for an H100, not those for a CPU
        "scheduler": "vllm_workflow.engine.scheduler.WorkflowScheduler",
        "environment": ["_VLLM_WORKFLOW_EMULATION", "_VLLM_WORKFLOW_METRICS_DIR"],
    }


def test_where_nobody_parses_a_command_line_registering_imports_nothing() -> None:
    code = """
import json, sys
from vllm_workflow.emulation.plugin import platform, register
register()
assert platform() is None
heavy = {"vllm", "torch", "prometheus_client"}
print(json.dumps([m for m in sys.modules if m.split(".")[0] in heavy]))
"""

    assert run_python(code) == []
