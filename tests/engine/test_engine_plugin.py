import argparse
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.engine import arg_utils

from vllm_workflow import vllm_metrics
from vllm_workflow.engine import plugin


@pytest.fixture
def parser(monkeypatch: pytest.MonkeyPatch) -> argparse.ArgumentParser:
    """The parser of a vLLM that has loaded the plug-in, with the two flags that matter."""

    class EngineArgs:
        @staticmethod
        def add_cli_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
            parser.add_argument("--scheduler-cls", default=None)
            parser.add_argument("--scheduler-reserve-full-isl", default=None)
            return parser

    monkeypatch.setattr(arg_utils, "EngineArgs", EngineArgs)
    monkeypatch.setattr(vllm_metrics, "serve_from_this_process", lambda: None)
    plugin.register()
    plugin.register()
    return EngineArgs.add_cli_args(argparse.ArgumentParser())


@pytest.mark.parametrize(
    ("arguments", "scheduler"),
    [
        ([], None),
        (["--scheduler", "workflow"], plugin.WORKFLOW_SCHEDULER),
        (["--scheduler", "vllm"], None),
        (["--scheduler", "my.package.Scheduler"], "my.package.Scheduler"),
        (["--scheduler-cls", "my.Scheduler"], "my.Scheduler"),
        (["--scheduler-cls", "my.Scheduler", "--scheduler", "vllm"], None),
    ],
)
def test_the_flag_names_a_scheduler(
    parser: argparse.ArgumentParser, arguments: list[str], scheduler: str | None
) -> None:
    assert parser.parse_args(arguments).scheduler_cls == scheduler


def test_an_unknown_name_is_refused(
    parser: argparse.ArgumentParser, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parser.parse_args(["--scheduler", "wrokflow"])

    assert "argument --scheduler: unknown scheduler 'wrokflow'" in capsys.readouterr().err


def test_a_bad_policy_is_refused_before_anything_starts(
    parser: argparse.ArgumentParser,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    path = tmp_path / "policy.json"
    path.write_text(json.dumps({"urgent_slack_s": -1}), encoding="utf-8")
    monkeypatch.setenv("VLLM_WORKFLOW_POLICY", str(path))

    with pytest.raises(SystemExit):
        parser.parse_args(["--scheduler", "workflow"])

    assert f"{path}: urgent_slack_s: expected" in capsys.readouterr().err


def test_the_policy_variable_is_known_to_vllm_only_when_set(
    parser: argparse.ArgumentParser, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm import envs

    assert "VLLM_WORKFLOW_POLICY" not in envs.environment_variables
    monkeypatch.setattr(envs, "environment_variables", dict(envs.environment_variables))
    monkeypatch.setenv("VLLM_WORKFLOW_POLICY", "hexgen")

    plugin.register()

    assert envs.environment_variables["VLLM_WORKFLOW_POLICY"]() == "hexgen"


def test_a_vllm_of_unknown_shape_is_left_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    monkeypatch.setitem(sys.modules, "vllm.engine.arg_utils", SimpleNamespace())

    plugin.register()

    (record,) = caplog.records
    assert "cannot add --scheduler to vLLM" in record.message
    assert "use --scheduler-cls" in record.message


def test_a_vllm_with_a_flag_of_the_same_name_keeps_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class EngineArgs:
        @staticmethod
        def add_cli_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
            parser.add_argument("--scheduler", default="theirs")
            return parser

    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    monkeypatch.setattr(arg_utils, "EngineArgs", EngineArgs)
    plugin.register()

    namespace = EngineArgs.add_cli_args(argparse.ArgumentParser()).parse_args([])

    assert namespace.scheduler == "theirs"
    assert "has a --scheduler flag of its own" in caplog.text


def run_python(code: str, **environment: str) -> Any:
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout.splitlines()[-1])


def test_where_nobody_parses_a_command_line_registering_imports_nothing() -> None:
    code = """
import json, sys
from vllm_workflow.engine.plugin import register
register()
heavy = {"vllm", "torch", "prometheus_client"}
print(json.dumps([m for m in sys.modules if m.split(".")[0] in heavy]))
"""

    assert run_python(code) == []


def test_vllm_finds_the_entry_point_and_the_real_parser_has_the_flag() -> None:
    code = """
import json
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
args = parser.parse_args(["--scheduler", "workflow"])
engine_args = AsyncEngineArgs.from_cli_args(args)
print(json.dumps([engine_args.scheduler_cls, parser.parse_args([]).scheduler_cls]))
"""

    assert run_python(code) == [plugin.WORKFLOW_SCHEDULER, None]
