"""One online tuning, described by values, so that a process of its own can do it."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vllm_workflow.core.policy_grid import default_grid, points
from vllm_workflow.core.workflow import StageProfile, WorkflowProfile
from vllm_workflow.sim.log_tuner import tune_log
from vllm_workflow.sim.log_window import tail_window
from vllm_workflow.sim.policy_files import append_history, write_policy
from vllm_workflow.sim.tuner import TunerSettings
from vllm_workflow.sim.tuner_report import as_json


def tuned(job: Mapping[str, Any]) -> dict[str, Any]:
    """Do a job; returns the verdict, after writing what it says to write.

    Raises:
        ConfigError: The log cannot be read, or a file cannot be written.
    """
    log = tail_window(Path(job["log"]), job["state"], window_s=job["window_s"])
    workflows = [
        WorkflowProfile(name=each["name"], stages=tuple(StageProfile(**s) for s in each["stages"]))
        for each in job["workflows"]
    ]
    found = tune_log(
        log,
        points(log.policy, job["grid"] or default_grid(log.policy), source="tuner.grid"),
        TunerSettings(**job["settings"]),
        workflows=workflows or None,
        max_runs=job["max_runs"],
    )
    now = datetime.now(UTC).isoformat(timespec="seconds")
    verdict = {"time": now, **as_json(found)}
    if job["history_file"]:
        append_history(Path(job["history_file"]), verdict, max_entries=job["max_history"])
    if found.verdict.swap:
        write_policy(Path(job["policy_file"]), found.verdict.policy)
    return verdict
