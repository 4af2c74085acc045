"""What docs/benchmarking.md says."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from vllm_workflow.bench import compare_flags
from vllm_workflow.bench.results import METRICS, summarize
from vllm_workflow.bench.validity import MAX_CPU_SHARE, MAX_LATE_SEND_SHARE, MAX_WRONG_LENGTH_SHARE
from vllm_workflow.cli.bench_flags import add_flags
from vllm_workflow.emulation.lateness import MAX_LATE_SHARE

PAGE = (Path(__file__).parents[2] / "docs" / "benchmarking.md").read_text(encoding="utf-8")
TEXT, REST = PAGE.split("## Comparing policies without a server")
COMPARING = REST.split("\n## ")[0]


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser()
    add_flags(found)
    return found


def flags(of: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    return {name: action for action in of._actions for name in action.option_strings}


def example(language: str) -> str:
    (text,) = re.findall(rf"```{language}\n(.*?)```", TEXT, flags=re.DOTALL)
    return str(text)


def test_the_command_is_one_that_the_parser_takes() -> None:
    words = shlex.split(example("bash").replace("\\\n", " "))

    assert words[:3] == ["vllm-workflow", "bench", "serve"]
    assert parser().parse_args(words[3:]).num_prompts == 200


def test_the_page_of_ones_own_is_written(tmp_path: Path) -> None:
    code = example("python")
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)

    html = (tmp_path / "two_policies.html").read_text(encoding="utf-8")
    assert re.findall(r"<h2>(.*?)</h2>", html) == ["Attainment", "All seeds", "Conditions"]


def test_every_flag_that_it_names_exists() -> None:
    elsewhere = {"--scheduler", "--emulate-gpu", "--emulate-time-scale"}
    named = set(re.findall(r"--[a-z][a-z-]+", TEXT))

    assert named - elsewhere <= set(flags(parser()))


def test_what_it_says_of_comparing_is_what_that_command_line_takes() -> None:
    (text,) = re.findall(r"```bash\n(.*?)```", COMPARING, flags=re.DOTALL)
    words = shlex.split(text.replace("\\\n", " "))

    assert words[:2] == ["python", "benchmarks/compare.py"]
    compare_flags.options(compare_flags.parser().parse_args(words[2:]))
    named = set(re.findall(r"--[a-z][a-z-]+", COMPARING))
    assert named <= set(flags(compare_flags.parser()))


def test_every_key_that_it_names_is_in_a_result() -> None:
    section = TEXT.split("## What is reported")[1].split("## ")[0]
    keys = set(summarize([]))
    others = {"valid", "invalid_reasons", "generator", "emulated_servers", "meta", "runs"}
    first_column = "".join(line.split(" | ")[0] for line in section.splitlines())
    named = set(re.findall(r"`([a-z_0-9]+)`", first_column))

    assert named - {"none"} <= keys | others
    assert all(f"mean_{metric}_ms" in keys for metric in METRICS)


def test_the_limits_of_validity_are_those_of_the_code() -> None:
    section = TEXT.split("## When a result is not valid")[1]
    shares = [int(n) / 100 for n in re.findall(r"\| (\d+) % ", section)]

    assert shares == [MAX_LATE_SEND_SHARE, MAX_CPU_SHARE, MAX_WRONG_LENGTH_SHARE, MAX_LATE_SHARE]


@pytest.mark.vllm
@pytest.mark.skipif(not find_spec("vllm"), reason="vLLM is not installed")
def test_flags_that_vllm_bench_serve_has_too_have_its_defaults() -> None:
    code = (
        "import argparse, json; from vllm.benchmarks.serve import add_cli_args; "
        "p = argparse.ArgumentParser(); add_cli_args(p); "
        "print(json.dumps({n: a.default for a in p._actions for n in a.option_strings "
        "if not isinstance(a.default, dict)}))"
    )
    printed = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    ).stdout
    theirs = json.loads(printed.splitlines()[-1])
    ours = {name: action.default for name, action in flags(parser()).items()}
    differ = {n for n in set(ours) & set(theirs) if (ours[n] or None) != (theirs[n] or None)}

    assert len(set(ours) & set(theirs)) >= 25
    # More percentiles, an id that is drawn later, what an empty value stands for, a trace.
    assert differ <= {
        *("--percentile-metrics", "--metric-percentiles", "--request-id-prefix"),
        *("--extra-body", "--result-dir", "--dataset-path", "--num-prompts"),
    }
