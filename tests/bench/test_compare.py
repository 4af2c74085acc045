"""Comparisons from end to end, small ones."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from vllm_workflow.bench.compare import Comparison, Options, best_baseline, compare
from vllm_workflow.bench.compare_jobs import Job, Setting, Variant, run_job, seed_trace
from vllm_workflow.bench.compare_report import document, page
from vllm_workflow.bench.compare_text import paper_rows, tables
from vllm_workflow.core.config import PolicyConfig
from vllm_workflow.core.errors import ConfigError
from vllm_workflow.sim.trace import write_trace
from vllm_workflow.sim.workloads import load

PAPER = ("round-robin+fcfs", "round-robin+urgency", "hexgen+fcfs", "hexgen+urgency")
ROW = {
    *("policy", "trace", "fleet", "level", "rate", "load", "seed", "slo_s"),
    *("arrived", "finished", "failed", "attainment", "goodput", "throughput"),
    *("p50_s", "p95_s", "p99_s", "mean_s", "slo_scale_at_95", "slo_scale_at_99", "decision_us"),
}
PAIR = {"policy", "against", "trace", "rate", "metric", "ratio", "ci_low", "ci_high", "seeds"}


def options(*policies: str, **fields: object) -> Options:
    """Few runs at one rate, on two GPUs."""
    setup = replace(Options().setup, fleet="A100:1,L40S:1", num_runs=12)
    defaults: dict[str, object] = {
        "setup": setup,
        "rates": (0.06,),
        "num_seeds": 2,
        "policies": policies or ("workflow", "least-outstanding+fcfs"),
    }
    return replace(Options(), **{**defaults, **fields})  # type: ignore[arg-type]


def without_clock(found: Comparison) -> list[dict[str, object]]:
    return [{k: v for k, v in row.items() if k != "decision_us"} for row in found.rows]


@pytest.fixture(scope="module")
def paper() -> Comparison:
    return compare(options("workflow", "least-outstanding+fcfs", *PAPER))


def test_rows_and_pairs_have_the_columns_that_scripts_rely_on(paper: Comparison) -> None:
    said = document(paper, ["compare"])

    assert len(said["rows"]) == 6 * 2
    assert all(row.keys() >= ROW for row in said["rows"])
    assert all(pair.keys() >= PAIR for pair in said["pairs"])
    assert said["meta"]["command"] == "compare"
    json.dumps(said, allow_nan=False)


def test_every_policy_meets_the_same_runs_and_arrivals(paper: Comparison) -> None:
    (setting,) = paper.settings
    by_policy = [paper.samples[entry.name, setting] for entry in paper.entries]

    for seeds in zip(*by_policy):
        assert len({sample.arrivals for sample in seeds}) == 1
        assert len({sample.references_s for sample in seeds}) == 1
    assert by_policy[0][0].arrivals != by_policy[0][1].arrivals


def test_no_run_is_faster_than_its_lower_bound(paper: Comparison) -> None:
    for samples in paper.samples.values():
        for sample in samples:
            assert all(t >= r for t, r in zip(sample.latencies_s, sample.references_s))


def test_all_are_held_against_least_outstanding_and_the_best_baseline(paper: Comparison) -> None:
    rows = {e.name: paper.rows_of(paper.settings[0], e.name) for e in paper.entries}
    best = best_baseline(rows)

    assert {pair["against"] for pair in paper.pairs} == {"least-outstanding+fcfs", best}
    assert {p["policy"] for p in paper.pairs if p["against"] == best} == rows.keys() - {best}


def test_the_default_policy_stands_below_the_paper_s_table_where_both_are_compared(
    paper: Comparison,
) -> None:
    assert [row["dispatch"] for row in paper_rows(paper, paper.settings[0])][4:] == ["workflow"]


def test_the_table_is_sorted_by_p95_and_the_paper_s_follows(paper: Comparison) -> None:
    lines = tables(paper).splitlines()
    at = lines.index("HexGen-Text2SQL by part")
    policies = [line.split()[0] for line in lines[2 : at - 2]]

    p95 = {
        e.name: sum(r["p95_s"] for r in paper.rows if r["policy"] == e.name) for e in paper.entries
    }
    assert policies == sorted(p95, key=p95.__getitem__)
    assert [line.split()[:2] for line in lines[at + 2 : at + 6]] == [
        name.split("+") for name in PAPER
    ]


def test_the_page_needs_nothing_else(paper: Comparison) -> None:
    html = page(paper, ["compare"])

    assert html.count("<svg") == 3
    assert "builtin:chess, 0.06 runs/s" in html
    assert not any(loads in html for loads in ("src=", "<link", "@import", "url(http"))


def test_results_do_not_depend_on_the_number_of_processes() -> None:
    assert without_clock(compare(options(num_jobs=2))) == without_clock(compare(options()))


@pytest.mark.slow
def test_loads_are_fractions_of_a_capacity_that_is_found_first() -> None:
    found = compare(options("workflow", rates=(), loads=(0.5, 1.0), num_seeds=1))

    capacity = found.capacities["builtin:chess"].rate
    assert [(row["load"], row["rate"]) for row in found.rows] == [
        (0.5, 0.5 * capacity),
        (1.0, capacity),
    ]


def test_one_slo_for_all_runs_replaces_the_scale() -> None:
    found = compare(options(slo_s=90.0, num_seeds=1))

    assert {(row["slo_s"], row["slo_scale"]) for row in found.rows} == {(90.0, None)}


def test_a_longer_slo_is_never_met_by_fewer_runs_where_nobody_looks_at_it() -> None:
    found = compare(options("least-outstanding+fcfs", slo_scales=(1.5, 3.0, 6.0), num_seeds=1))

    attained = [row["attainment"] for row in found.rows]
    assert attained == sorted(attained)
    assert len(set(attained)) > 1


def test_the_oracle_is_at_least_as_good_as_any_alpha_of_its_grid() -> None:
    found = compare(options("hexgen-oracle+urgency", "hexgen+urgency", rates=(0.1,)))
    (setting,) = found.settings

    def p95(policy: str) -> float:
        return sum(row["p95_s"] for row in found.rows_of(setting, policy))

    assert p95("hexgen-oracle+urgency") <= p95("hexgen+urgency")
    assert (
        found.rows[0]["variant"]
        == f"α {found.chosen['hexgen-oracle+urgency', setting].policy.alpha:g}"
    )


def test_a_clairvoyant_is_told_the_true_lengths_and_the_work_left() -> None:
    setup = options().setup
    setting = Setting(trace="builtin:chess", rate=0.1, load=None, slo_scale=4.0, slo_s=None)

    def latencies(is_clairvoyant: bool) -> tuple[float, ...]:
        variant = Variant(policy=PolicyConfig(), is_clairvoyant=is_clairvoyant)
        job = Job(setup=setup, setting=setting, variant=variant, seed=0, level=1)
        return run_job(job).latencies_s

    assert latencies(True) != latencies(False)


def test_the_clairvoyant_says_what_it_chose() -> None:
    found = compare(options("clairvoyant", num_seeds=1))

    assert found.rows[0]["variant"] in {v.label for v in found.entries[0].variants}


def test_runs_come_from_a_file_too(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    write_trace(path, load("builtin:mac", 12, 0))

    found = compare(options(traces=(str(path),), rates=(0.2,), num_seeds=1))

    assert {row["trace"] for row in found.rows} == {str(path)}
    assert all(math.isfinite(row["p95_s"]) for row in found.rows)


def test_each_seed_takes_the_runs_of_a_file_in_another_order(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    write_trace(path, load("builtin:mac", 12, 0))

    ids = [[run.run_id for run in seed_trace(str(path), 12, seed).runs] for seed in (0, 1)]

    assert ids[0] != ids[1]
    assert sorted(ids[0]) == sorted(ids[1])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"policies": ("fastest",)}, r"--policies: policy: unknown policy 'fastest'"),
        ({"traces": ("none.jsonl",)}, r"none\.jsonl"),
        ({"traces": ("builtin:none",)}, r"expected a file or one of"),
        ({"level": 4}, r"level 4 is not available"),
        ({"against": "workflow+x"}, r"--against: expected one of the policies"),
        ({"setup": replace(Options().setup, fleet="B99:1")}, r"B99"),
    ],
)
def test_what_is_unknown_is_said_before_anything_runs(
    fields: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        compare(options(**fields))  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_level_1_is_held_against_level_2() -> None:
    pytest.importorskip("vllm")

    found = compare(options("workflow", num_seeds=1, level=2))

    error = document(found, [])["meta"]["level_error"]
    assert {row["level"] for row in found.rows} == {2}
    assert error["worst_abs"] == pytest.approx(0.0, abs=0.03)
