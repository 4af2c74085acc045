"""Generated runs, and the one door to all runs."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_workflow.core.errors import ConfigError
from vllm_workflow.sim.distributions import LogNormal, zipf
from vllm_workflow.sim.rng import stream
from vllm_workflow.sim.run_builder import RunBuilder
from vllm_workflow.sim.trace import read_trace, write_trace
from vllm_workflow.sim.types import PrefixPart, Trace, TraceCall, TraceRun
from vllm_workflow.sim.workloads import builtin_names, load

NAMES = builtin_names()


def count(run: TraceRun, stage: str) -> int:
    return sum(call.stage == stage for call in run.calls)


def mean(trace: Trace, of: Callable[[TraceRun], float]) -> float:
    return statistics.mean(of(run) for run in trace.runs)


def parts(trace: Trace) -> set[str]:
    return {p.part_id for run in trace.runs for call in run.calls for p in call.prefix}


def with_prefix(call_id: str, *part_ids: str) -> TraceCall:
    prefix = tuple(PrefixPart(part_id=part_id, num_tokens=5) for part_id in part_ids)
    return TraceCall(
        call_id=call_id, stage="s", num_prompt_tokens=50, num_output_tokens=3, prefix=prefix
    )


def saved(path: Path, *runs: TraceRun) -> Path:
    write_trace(path, Trace(runs=runs, source="t"))
    return path


def two_runs(path: Path) -> Path:
    return saved(
        path,
        TraceRun(
            run_id="x", workflow="w", calls=(with_prefix("a", "head", "mine"),), arrival_s=1.0
        ),
        TraceRun(run_id="y", workflow="w", calls=(with_prefix("a", "head", "y/q"),), arrival_s=2.0),
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_generated_trace_survives_the_readers_checks(name: str, tmp_path: Path) -> None:
    trace = load(name, 60, seed=5)

    write_trace(tmp_path / "t.jsonl", trace)

    assert read_trace(tmp_path / "t.jsonl") == trace


@pytest.mark.parametrize("name", NAMES)
def test_the_first_runs_do_not_depend_on_how_many_are_drawn(name: str) -> None:
    assert load(name, 5, seed=1).runs == load(name, 9, seed=1).runs[:5]


@pytest.mark.parametrize("name", NAMES)
def test_a_seed_decides_everything(name: str) -> None:
    assert load(name, 5, seed=1) == load(name, 5, seed=1)
    assert load(name, 5, seed=1).runs != load(name, 5, seed=2).runs


@pytest.mark.parametrize("name", NAMES)
def test_runs_share_templates_and_databases_and_nothing_else(name: str) -> None:
    runs = load(name, 30, seed=2).runs

    for run in runs:
        for part in {p.part_id for call in run.calls for p in call.prefix}:
            is_own = part.startswith(f"{run.run_id}/")
            assert is_own or "/template/" in part or "/database/" in part


@pytest.mark.parametrize("name", NAMES)
def test_a_part_has_the_same_tokens_wherever_it_stands(name: str) -> None:
    trace = load(name, 30, seed=2)

    listed = {p for run in trace.runs for call in run.calls for p in call.prefix}

    assert len({p.part_id for p in listed}) == len(listed)


def test_a_further_stage_does_not_change_what_others_draw() -> None:
    plain, longer = (RunBuilder("w", 0, 7) for _ in range(2))
    longer.rng("new stage").random()

    assert plain.rng("old stage").random() == longer.rng("old stage").random()


def test_chess_has_the_recorded_calls_and_lengths() -> None:
    trace = load("builtin:chess", 2000, seed=0)

    # Recorded on the two databases: 15.9 and 17.4 calls, 31.9k and 44.9k prompt tokens, 1599
    # and 1722 output tokens per run, revisions of 188 and 119 output tokens.
    assert 15.4 < mean(trace, lambda r: len(r.calls)) < 17.4
    assert 31e3 < mean(trace, lambda r: sum(c.num_prompt_tokens for c in r.calls)) < 45e3
    assert 1500 < mean(trace, lambda r: sum(c.num_output_tokens for c in r.calls)) < 1722
    revisions = [c.num_output_tokens for r in trace.runs for c in r.calls if c.stage == "revise"]
    assert 119 < statistics.mean(revisions) < 188
    assert statistics.pstdev(revisions) == pytest.approx(229, rel=0.15)
    assert mean(trace, lambda r: count(r, "revise") == 0) == pytest.approx(87 / 123, abs=0.04)


def test_flat_chess_has_all_numbers_of_revisions_equally_often() -> None:
    trace = load("builtin:chess-flat", 2000, seed=0)

    for number in range(11):
        share = mean(trace, lambda r, n=number: count(r, "revise") == n)  # type: ignore[misc]
        assert share == pytest.approx(1 / 11, abs=0.025)


def test_mac_has_the_published_calls_and_tokens() -> None:
    # Over many seeds, because each draws the schemas of its eleven databases.
    runs = tuple(run for seed in range(20) for run in load("builtin:mac", 150, seed).runs)
    trace = Trace(runs=runs, source="t")

    assert mean(trace, lambda r: len(r.calls)) == pytest.approx(3.6, rel=0.03)
    assert mean(trace, lambda r: sum(c.num_prompt_tokens for c in r.calls)) == pytest.approx(
        6791, rel=0.05
    )
    assert mean(trace, lambda r: sum(c.num_output_tokens for c in r.calls)) == pytest.approx(
        1198, rel=0.05
    )


def test_chase_generates_21_candidates_side_by_side() -> None:
    for run in load("builtin:chase", 20, seed=0).runs:
        candidates = {c.call_id for c in run.calls if c.stage == "generate_candidate"}
        assert len(candidates) == 21
        assert all(not candidates & set(c.after) for c in run.calls if c.call_id in candidates)


def test_a_turn_of_reforce_begins_with_the_whole_turn_before() -> None:
    run = load("builtin:reforce", 1, seed=0).runs[0]
    by_id = {call.call_id: call for call in run.calls}
    refined = [call for call in run.calls if call.stage == "refine"]

    assert refined
    for call in refined:
        (parent,) = call.after
        before = by_id[parent]
        assert call.prefix[: len(before.prefix)] == before.prefix
        assert call.num_prompt_tokens > before.num_prompt_tokens + before.num_output_tokens


def test_the_first_database_is_asked_about_most() -> None:
    rng = stream(0, "zipf")
    ranks = [zipf(4, 1.0, rng) for _ in range(20_000)]

    total = 1 + 1 / 2 + 1 / 3 + 1 / 4
    for rank in range(4):
        assert ranks.count(rank) / 20_000 == pytest.approx(1 / (rank + 1) / total, abs=0.015)


@given(st.floats(1.0, 1e4), st.floats(0.0, 1e4), st.integers(0, 10**6))
def test_a_log_normal_stays_within_its_ends(mean: float, sd: float, seed: int) -> None:
    each = LogNormal(mean=mean, sd=sd, low=0.5 * mean, high=2 * mean)

    assert 0.5 * mean <= each.draw(stream(seed)) <= 2 * mean


def test_a_log_normal_has_its_mean_and_deviation() -> None:
    rng = stream(0, "log-normal")
    drawn = [LogNormal(mean=100, sd=40).draw(rng) for _ in range(20_000)]

    assert statistics.mean(drawn) == pytest.approx(100, rel=0.02)
    assert statistics.pstdev(drawn) == pytest.approx(40, rel=0.05)


def test_all_of_a_file_is_loaded_unless_a_number_is_given(tmp_path: Path) -> None:
    path = two_runs(tmp_path / "t.jsonl")

    assert load(path) == read_trace(path)
    assert [r.run_id for r in load(path, 1).runs] == ["x"]
    assert "The first 1 of 2 runs." in load(path, 1).notes


def test_a_file_with_too_few_runs_is_repeated_with_ids_and_parts_of_its_own(
    tmp_path: Path,
) -> None:
    trace = load(two_runs(tmp_path / "t.jsonl"), 4, seed=3)

    assert {r.run_id for r in trace.runs} == {"x", "y", "x~2", "y~2"}
    assert parts(trace) == {"head", "mine", "y/q", "x~2/mine", "y~2/q"}
    assert all(r.arrival_s is None for r in trace.runs)
    assert "2 runs were resampled to 4" in trace.notes[-1]
    assert load(two_runs(tmp_path / "t.jsonl"), 4, seed=3) == trace


def test_resampling_takes_every_run_equally_often(tmp_path: Path) -> None:
    trace = load(two_runs(tmp_path / "t.jsonl"), 101, seed=3)

    assert sum(r.run_id.startswith("x") for r in trace.runs) in (50, 51)
    assert len({r.run_id for r in trace.runs}) == 101


def test_of_a_single_run_only_parts_that_bear_its_name_are_its_own(tmp_path: Path) -> None:
    run = TraceRun(run_id="x", workflow="w", calls=(with_prefix("a", "head", "x/q"),))

    trace = load(saved(tmp_path / "t.jsonl", run), 2)

    assert parts(trace) == {"head", "x/q", "x~2/q"}


def test_a_copy_never_takes_the_id_of_another_run(tmp_path: Path) -> None:
    runs = [TraceRun(run_id=i, workflow="w", calls=(with_prefix("a"),)) for i in ("x", "x~2")]

    trace = load(saved(tmp_path / "t.jsonl", *runs), 6)

    assert len({r.run_id for r in trace.runs}) == 6


@pytest.mark.parametrize(
    ("name", "num_runs", "wanted"),
    [
        ("builtin:none", 5, r"expected a file or one of \['builtin:chess'.*got 'builtin:none'"),
        ("builtin:chess", 0, "number of runs: expected at least 1, got 0"),
    ],
)
def test_what_cannot_be_loaded_is_named(name: str, num_runs: int, wanted: str) -> None:
    with pytest.raises(ConfigError, match=wanted):
        load(name, num_runs)
