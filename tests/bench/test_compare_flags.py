"""The command line of a comparison."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_workflow.bench.compare_flags import options, parser
from vllm_workflow.core.errors import ConfigError

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "compare.py"


def test_values_may_stand_together_or_be_repeated() -> None:
    args = parser().parse_args(
        shlex.split("--loads 0.5 0.7 --loads 0.9 --policies workflow --policies baselines hexgen")
    )

    found = options(args)

    assert found.loads == (0.5, 0.7, 0.9)
    assert found.policies == ("workflow", "baselines", "hexgen")


def test_without_flags_the_defaults_hold() -> None:
    found = options(parser().parse_args([]))

    assert found.traces == ("builtin:chess",)
    assert (found.setup.fleet, found.setup.model_shape) == (
        "A100:2,A6000:1,L40S:1",
        "llama-3.1-70b",
    )
    assert (found.loads, found.slo_scales, found.rates) == ((0.7, 0.85, 1.0), (5.0,), ())
    assert (found.num_seeds, found.setup.num_runs, found.level) == (5, 200, 1)


@pytest.mark.parametrize(
    "flags",
    [
        "--rates -1",
        "--rates nan",
        "--rates fast",
        "--loads 0",
        "--slo-scales inf",
        "--slo-s 0",
        "--seeds 0",
        "--runs 1.5",
        "--jobs 0",
        "--level 4",
        "--weight-bits 5",
        "--no-such-flag",
    ],
)
def test_a_bad_number_is_one_line_and_status_2(
    flags: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as e:
        parser().parse_args(flags.split())

    said = capsys.readouterr().err
    assert e.value.code == 2
    assert said.count("\n") == 1
    assert flags.split()[0] in said


@pytest.mark.parametrize("flags", ["--rates 1 --loads 1", "--slo-s 1 --slo-scales 2"])
def test_flags_that_contradict_each_other_are_refused(flags: str) -> None:
    with pytest.raises(ConfigError, match="expected either"):
        options(parser().parse_args(flags.split()))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--policies fastest", "unknown policy 'fastest'"),
        ("--policies peers", "'peers': other routers are for --level 3 only"),
        ("--trace none.jsonl", "none.jsonl"),
        ("--fleet fleet.yaml", "fleet.yaml"),
        ("--model-shape none", "none"),
        ("--json /dev/null/x.json", "cannot write"),
    ],
)
def test_the_script_says_what_is_wrong_in_one_line(flags: str, said: str) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *flags.split()],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(SCRIPT.parents[1])},
    )

    assert done.returncode == 2
    error = [line for line in done.stderr.splitlines() if "error:" in line]
    assert len(error) == 1
    assert said in error[0]
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
