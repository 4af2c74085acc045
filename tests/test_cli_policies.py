"""`vllm-workflow policies`, where nothing but Python is installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from tests.readme import ROOT
from vllm_workflow.core import policy_names
from vllm_workflow.core.config import PolicyConfig


def run(*args: str) -> str:
    """Run the command without site-packages."""
    command = [sys.executable, "-S", "-m", "vllm_workflow.cli.main", "policies", *args]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, encoding="utf-8", check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_every_name_has_one_line() -> None:
    lines = [line.split()[0] for line in run().splitlines() if line.startswith("  ")]

    for names in (policy_names.PRESET, policy_names.DISPATCH, policy_names.ORDERING):
        assert set(names) <= set(lines)
    assert {"+late", "+relegate"} <= set(lines)
    for name in policy_names.ALL[1:]:
        assert lines.count(name) == 1


def test_programs_can_read_what_each_name_stands_for() -> None:
    said = json.loads(run("--json"))

    assert said["default"] == "workflow"
    assert said["baselines"] == list(policy_names.BASELINES)
    assert [policy["name"] for policy in said["policies"]] == list(policy_names.ALL)
    for policy in said["policies"]:
        config = PolicyConfig.from_mapping(policy["fields"], source=policy["name"])
        assert config.fingerprint == policy["fingerprint"]
    assert said["ordering"]["plas"]["source"] == "Autellix, arXiv 2502.13965"
