"""What the router remembers of runs."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_workflow.router.runs import Run, Runs
from vllm_workflow.router.wire import RunInfo


def make(**limits: Any) -> tuple[Runs, list[Run]]:
    ended: list[Run] = []
    return Runs(ended.append, **limits), ended


def info(workflow_id: str = "w", **fields: Any) -> RunInfo:
    return RunInfo(workflow_id=workflow_id, **fields)


def call(runs: Runs, said: RunInfo, start: float, end: float, *, ok: bool = True) -> float:
    """Make one call of a run; returns the deadline it had."""
    run = runs.begin(said, start)
    deadline = run.deadline
    runs.end(said, run, end, ok=ok)
    return deadline


def test_an_slo_counts_from_the_first_call_of_the_run() -> None:
    runs, _ = make()

    assert call(runs, info(slo_ms=30_000.0), 100.0, 101.0) == 130.0
    assert call(runs, info(slo_ms=30_000.0), 120.0, 121.0) == 130.0
    assert call(runs, info(), 125.0, 126.0) == 130.0


def test_an_slo_given_late_counts_from_the_first_call_too() -> None:
    runs, _ = make()

    assert call(runs, info(), 100.0, 101.0) == math.inf
    assert call(runs, info(slo_ms=30_000.0), 120.0, 121.0) == 130.0


def test_a_budget_sets_the_deadline_anew_and_wins_over_an_slo() -> None:
    runs, _ = make()

    assert call(runs, info(slo_ms=30_000.0), 100.0, 101.0) == 130.0
    assert call(runs, info(slo_ms=30_000.0, budget_ms=5_000.0), 110.0, 111.0) == 115.0
    assert call(runs, info(), 112.0, 113.0) == 115.0
    assert call(runs, info(slo_ms=30_000.0), 112.0, 113.0) == 115.0
    assert call(runs, info(budget_ms=0.0), 113.0, 114.0) == 113.0


def test_a_call_without_an_id_is_a_run_of_its_own() -> None:
    runs, _ = make()

    assert call(runs, info("", slo_ms=1_000.0), 0.0, 0.5) == 1.0
    assert call(runs, info("", slo_ms=1_000.0), 5.0, 5.5) == 6.0
    assert len(runs) == 0


def test_the_runs_of_two_tenants_are_two_runs() -> None:
    runs, _ = make()
    call(runs, info(tenant_id="a", slo_ms=1_000.0), 0.0, 0.5)

    assert call(runs, info(tenant_id="b"), 0.5, 0.6) == math.inf


@pytest.mark.parametrize(("end", "met"), [(29.0, True), (31.0, False)])
def test_a_final_call_ends_its_run(end: float, met: bool) -> None:
    runs, ended = make()
    call(runs, info(slo_ms=30_000.0), 0.0, 10.0)
    call(runs, info(final=True), 10.0, end)

    assert len(runs) == 0
    assert [run.met for run in ended] == [met]


def test_of_final_calls_side_by_side_the_last_to_end_ends_the_run() -> None:
    runs, ended = make()
    last = info(slo_ms=30_000.0, final=True)
    first, second = runs.begin(last, 0.0), runs.begin(last, 0.0)
    runs.end(last, first, 10.0, ok=True)
    assert ended == []

    runs.end(last, second, 31.0, ok=True)
    assert [run.met for run in ended] == [False]
    assert len(runs) == 0


def test_a_run_that_says_nothing_of_its_end_counts_a_minute_after_its_last_call() -> None:
    runs, ended = make()
    call(runs, info("short", slo_ms=30_000.0), 0.0, 10.0)
    call(runs, info("long", slo_ms=300_000.0), 0.0, 10.0)
    call(runs, info("endless", slo_ms=9e9), 0.0, 10.0)
    runs.expire(69.0)
    assert ended == []
    runs.expire(70.0)
    assert len(ended) == 1
    runs.expire(299.0)
    assert len(ended) == 1  # the other one may go on, and be on time
    runs.expire(300.0)
    assert len(ended) == 2
    runs.expire(910.0)
    assert [run.met for run in ended] == [True] * 3


def test_a_run_that_counts_already_keeps_its_deadline_and_does_not_count_again() -> None:
    runs, ended = make()
    call(runs, info(slo_ms=30_000.0), 0.0, 10.0)
    runs.expire(70.0)

    assert call(runs, info(slo_ms=30_000.0, final=True), 80.0, 81.0) == 30.0
    assert len(ended) == 1


def test_a_call_that_is_a_run_of_its_own_counts() -> None:
    runs, ended = make()
    call(runs, info("", slo_ms=1_000.0), 0.0, 2.0)

    assert [run.met for run in ended] == [False]


def test_a_final_call_that_failed_may_be_tried_again() -> None:
    runs, ended = make()
    call(runs, info(slo_ms=30_000.0, final=True), 0.0, 10.0, ok=False)

    assert call(runs, info(final=True), 11.0, 12.0) == 30.0
    assert [run.met for run in ended] == [True]


def test_a_run_that_is_idle_too_long_has_ended_with_its_last_call() -> None:
    runs, ended = make(ttl_s=60.0)
    call(runs, info("good", slo_ms=30_000.0), 0.0, 10.0)
    call(runs, info("bad", slo_ms=30_000.0), 0.0, 20.0, ok=False)
    runs.expire(79.0)
    assert len(runs) == 1
    runs.expire(80.0)

    assert len(runs) == 0
    assert [run.met for run in ended] == [True, False]


def test_a_run_with_a_call_under_way_is_not_idle() -> None:
    runs, ended = make(ttl_s=60.0)
    said = info(slo_ms=30_000.0)
    run = runs.begin(said, 0.0)
    runs.expire(1000.0)
    assert ended == []

    runs.end(said, run, 1001.0, ok=True)
    runs.expire(1062.0)
    assert [run.met for run in ended] == [False]


def test_the_run_idle_longest_makes_room() -> None:
    runs, ended = make(max_idle=2)
    for workflow_id, start in (("a", 0.0), ("b", 1.0), ("a", 2.0), ("c", 3.0)):
        call(runs, info(workflow_id, workflow=workflow_id), start, start)

    assert [run.workflow for run in ended] == ["b"]
    assert len(runs) == 2


def test_a_run_with_a_call_under_way_makes_no_room() -> None:
    runs, ended = make(max_idle=2)
    runs.begin(info("busy", workflow="busy"), 0.0)
    for number in range(5):
        call(runs, info(f"idle-{number}", workflow="idle"), 1.0, 1.0)

    assert {run.workflow for run in ended} == {"idle"}
    assert len(runs) == 3


@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.booleans(), st.booleans(), st.floats(0.0, 50.0)),
        max_size=60,
    )
)
def test_every_run_ends_once_and_none_is_forgotten(
    script: list[tuple[str, bool, bool, float]],
) -> None:
    runs, ended = make(max_idle=2, ttl_s=60.0)
    seen, now = set[int](), 0.0
    open_calls: list[tuple[RunInfo, Run]] = []
    kept: list[Run] = []
    for workflow_id, final, begins, delay in script:
        now += delay
        if begins or not open_calls:
            said = info(workflow_id, final=final)
            run = runs.begin(said, now)
            open_calls.append((said, run))
            if id(run) not in seen:
                seen.add(id(run))
                kept.append(run)
        else:
            said, run = open_calls.pop()
            runs.end(said, run, now, ok=True)
        assert len(runs) <= 2 + len(open_calls)
    for said, run in open_calls:
        runs.end(said, run, now, ok=True)
    runs.expire(now + 1000.0)

    assert len(runs) == 0
    assert sorted(map(id, ended)) == sorted(map(id, kept))
