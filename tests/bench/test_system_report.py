from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.bench.builders import call_record, run_record
from vllm_workflow.bench.compare import Comparison, Options
from vllm_workflow.bench.compare_flags import options, parser, system_options
from vllm_workflow.bench.compare_jobs import Sample, Setting
from vllm_workflow.bench.system import SystemOptions, SystemRun, sample_of
from vllm_workflow.bench.system_compare import (
    SystemComparison,
    _pairs,
    _row,
    _shown,
    level_error_summary,
)
from vllm_workflow.bench.system_report import document, excluded_rows, page, text
from vllm_workflow.bench.system_router import systems
from vllm_workflow.sim.workloads import load

SETTING = Setting(trace="builtin:chess", rate=0.2, load=0.85, slo_scale=5.0, slo_s=None)
OPTIONS = Options(num_seeds=2)
NAMES = ("workflow", "least-outstanding+fcfs", "smg:least_load")
MACHINE = {"cpus": "2 x CPU", "load_average_before": "0.1", "load_average_after": "0.2"}


def sample(latency_s: float) -> Sample:
    return Sample(
        arrivals=(0.0, 1.0, 2.0),
        latencies_s=(latency_s, latency_s, latency_s),
        references_s=(10.0, 10.0, 10.0),
        slos_s=(50.0, 50.0, 50.0),
        decision_us=None,
    )


def system_run(name: str, seed: int, latency_s: float, **fields: Any) -> SystemRun:
    (system,) = systems([name])
    figures = {"emulated_servers": {"u": {"late_share": 0.05}}, "generator": {"cpu_share": 0.1}}
    defaults: dict[str, Any] = {"sample": sample(latency_s), "reasons": (), "figures": figures}
    return SystemRun(system=system, setting=SETTING, seed=seed, **{**defaults, **fields})


def below() -> Comparison:
    """Level 2 of the policies, all runs in 30 s."""
    runs = [system_run(name, seed, 30.0) for name in NAMES[:2] for seed in (0, 1)]
    rows = [{**_row(run, OPTIONS), "variant": None, "level": 2} for run in runs]
    shown = _shown(shell(), systems(NAMES[:2]), runs, rows, OPTIONS)
    return replace(shown, rows_below=shown.rows)


def shell() -> Comparison:
    return Comparison(
        options=OPTIONS,
        entries=(),
        settings=(SETTING,),
        samples={},
        chosen={},
        rows=(),
        pairs=(),
        capacities={},
        traces={"builtin:chess": load("builtin:chess", 3, 0)},
    )


def comparison(*runs: SystemRun) -> SystemComparison:
    found = systems(NAMES)
    rows = tuple(_row(run, OPTIONS) for run in runs)
    base = below()
    return SystemComparison(
        shown=_shown(base, found, runs, rows, OPTIONS),
        below=base,
        systems=found,
        runs=runs,
        rows=rows,
        options=SystemOptions(time_scale=4.0),
        machine=MACHINE,
    )


def valid_runs() -> list[SystemRun]:
    return [
        system_run(name, seed, latency_s)
        for name, latency_s in zip(NAMES, (40.0, 60.0, 50.0))
        for seed in (0, 1)
    ]


def test_a_run_that_the_cpu_could_not_keep_up_with_is_not_averaged_but_told() -> None:
    runs = valid_runs()
    late = system_run("workflow", 0, 1000.0, reasons=("server: 30 % added by the CPU",))
    found = comparison(late, *runs[1:])

    (row,) = found.shown.rows_of(SETTING, "workflow")
    assert (row["seed"], row["p95_s"]) == (1, 40.0)
    assert "1 of 6 measurements invalid" in text(found)
    assert excluded_rows(found)[0]["why not"] == "server: 30 % added by the CPU"
    assert document(found, ["c"])["meta"]["measurements_invalid"] == 1
    assert [row["valid"] for row in document(found, ["c"])["rows"]] == [False] + 5 * [True]


def test_a_system_that_does_not_work_has_a_sentence_in_the_place_of_numbers() -> None:
    runs = [
        system_run("smg:least_load", seed, 1.0, sample=None, problem="answered no call: status 400")
        for seed in (0, 1)
    ]
    found = comparison(*valid_runs()[:4], *runs)

    assert "smg:least_load" not in {entry.name for entry in found.shown.entries}
    assert text(found).count("answered no call: status 400") == 2


def test_nothing_valid_at_all_is_said_and_prints() -> None:
    runs = [system_run(name, 0, 40.0, reasons=("late",)) for name in NAMES]

    assert "No system has a valid measurement" in text(comparison(*runs))
    json.dumps(document(comparison(*runs), ["c"]), allow_nan=False)


def test_policies_are_held_against_the_simple_policy_and_the_best_other_router() -> None:
    found = comparison(*valid_runs())
    against = {(p["policy"], p["against"], p["metric"]): p["ratio"] for p in found.shown.pairs}

    assert against["workflow", "smg:least_load", "p95_s"] == pytest.approx(0.8)
    assert against["workflow", "least-outstanding+fcfs", "p95_s"] == pytest.approx(40 / 60)


def test_pairs_take_the_seeds_that_are_valid_on_both_sides() -> None:
    rows = [_row(run, OPTIONS) for run in valid_runs()]
    by_name = {each.name: each for each in systems(NAMES)}
    kept = [r for r in rows if not (r["policy"] == "smg:least_load" and r["seed"] == 0)]
    found = list(_pairs(kept, [SETTING], by_name, "smg:least_load"))

    assert {pair["seeds"] for pair in found if pair["ratio"] is not None} == {1}


def test_level_2_is_held_against_level_3_where_both_are_known() -> None:
    summary = level_error_summary(comparison(*valid_runs()))
    errors = {each["policy"]: each["p95_s_error"] for each in summary["settings"]}

    assert errors == pytest.approx({"workflow": -0.25, "least-outstanding+fcfs": -0.5})
    assert summary["worst_abs"] == pytest.approx(0.5)


def test_flags_of_level_3_become_its_options(tmp_path: Path) -> None:
    flags = parser().parse_args(
        ["--level", "3", "--time-scale", "2", "--workdir", str(tmp_path), "--peers-dir", "p"]
    )

    assert options(flags).level == 3
    assert system_options(flags) == SystemOptions(time_scale=2.0, workdir=tmp_path, peers=Path("p"))


def test_a_failed_run_misses_its_slo_in_the_order_of_arrival() -> None:
    failed = run_record(call_record(error="status 500"), arrival_s=1.0, slo_s=9.0)
    fine = run_record(call_record(), run_id="s", arrival_s=0.0, slo_s=9.0, reference_s=3.0)
    found = sample_of([failed, fine])

    assert found.latencies_s == (1.0, math.inf)
    assert found.slos_s == (9.0, 9.0)


def test_the_page_shows_what_is_valid_and_what_is_not() -> None:
    runs = valid_runs()
    late = system_run("workflow", 0, 1000.0, reasons=("server: 30 % added by the CPU",))
    shown = page(comparison(late, *runs[1:]), ["command"])

    assert shown is not None
    assert "server: 30 % added by the CPU" in shown
    assert "Level 2 against level 3" in shown
    assert page(comparison(late), ["command"]) is None
