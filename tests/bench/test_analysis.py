"""The analysis of a trace, against traces small enough to do by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vllm_workflow.bench.analysis import END, START, Analysis, Spread, analyze
from vllm_workflow.bench.analysis_page import page
from vllm_workflow.bench.analysis_prediction import explained, remaining
from vllm_workflow.bench.analysis_sharing import Sharing, sharing
from vllm_workflow.bench.analysis_tail import tail
from vllm_workflow.bench.analysis_text import MAX_ROWS, report
from vllm_workflow.bench.analysis_timing import Timeline, longest_path, services_s, timeline
from vllm_workflow.cli.main import main
from vllm_workflow.core.latency import LatencyModel
from vllm_workflow.profiles.profile import LatencyProfile
from vllm_workflow.sim.trace import write_trace
from vllm_workflow.sim.types import PrefixPart, Trace, TraceCall, TraceRun
from vllm_workflow.sim.workloads import load

SECOND_PER_STEP = LatencyModel(
    overhead_s=0.0, weights_s=1.0, per_token_s=0.0, max_num_batched_tokens=100
)
"""A call takes a second per 100 prompt tokens begun, and one per output token after the first."""
PROFILE = LatencyProfile(latency=SECOND_PER_STEP, gpu="G", model_shape="m", source="made up")


def call(
    call_id: str,
    *after: str,
    stage: str = "",
    output: int = 1,
    prompt: int = 100,
    gap_s: float = 0.0,
    prefix: str = "",
) -> TraceCall:
    """A call of the stage that its id names but for a trailing number; parts of 10 tokens."""
    return TraceCall(
        call_id=call_id,
        stage=stage or call_id.rstrip("0123456789"),
        num_prompt_tokens=prompt,
        num_output_tokens=output,
        after=after,
        gap_s=gap_s,
        prefix=tuple(PrefixPart(part_id=part, num_tokens=10) for part in prefix),
    )


def run(*calls: TraceCall, run_id: str = "r", arrival_s: float | None = None) -> TraceRun:
    return TraceRun(run_id=run_id, workflow="w", calls=calls, arrival_s=arrival_s)


def trace(*runs: TraceRun) -> Trace:
    return Trace(runs=runs, source="tiny")


def alone(one: TraceRun) -> Timeline:
    return timeline(one, services_s(SECOND_PER_STEP, one, [0] * len(one.calls)))


def chain(*outputs: int, run_id: str = "r") -> TraceRun:
    """One plan call, then as many fix calls as there are further outputs."""
    calls = [call("plan", output=outputs[0])]
    for i, output in enumerate(outputs[1:], start=1):
        calls.append(call(f"fix{i}", calls[-1].call_id, output=output))
    return run(*calls, run_id=run_id)


DIAMOND = run(
    call("plan", output=2),
    call("draft1", "plan", output=3),
    call("draft2", "plan", output=5, gap_s=0.5),
    call("judge", "draft1", "draft2", output=1, gap_s=1.0),
)
"""plan 0 to 2, drafts 2 to 5 and 2.5 to 7.5, judge 8.5 to 9.5."""


def analysis_of(*runs: TraceRun) -> Analysis:
    return analyze(trace(*runs), PROFILE)


def test_calls_start_when_what_they_follow_has_ended_and_their_gap_is_over() -> None:
    line = alone(DIAMOND)

    assert [(t.start_s, t.end_s) for t in line.calls] == [(0, 2), (2, 5), (2.5, 7.5), (8.5, 9.5)]
    assert [t.call.call_id for t in line.critical] == ["plan", "draft2", "judge"]
    assert (line.duration_s, line.work_s, line.critical_work_s, line.gap_s) == (9.5, 11, 8, 1.5)


def test_cached_prompt_tokens_take_no_time_but_the_last_one_always_does() -> None:
    one = run(call("a", prompt=300, output=2), call("b", prompt=300))

    assert services_s(SECOND_PER_STEP, one, [0, 150]) == {"a": 4.0, "b": 2.0}
    assert services_s(SECOND_PER_STEP, one, [300, 300]) == {"a": 2.0, "b": 1.0}


def test_the_longest_path_takes_the_heavier_branch() -> None:
    weight = {c.call_id: float(c.num_output_tokens) for c in DIAMOND.calls}

    assert longest_path(DIAMOND, weight) == 8.0


def test_paths_compare_the_critical_path_with_all_work() -> None:
    paths = analysis_of(DIAMOND).paths

    assert paths.duration_s.mean == 9.5
    assert paths.critical_output_tokens.max == 8
    assert paths.output_tokens.max == 11
    assert paths.speedup == pytest.approx(11 / 8)


def test_a_spread_interpolates_its_percentiles() -> None:
    assert Spread.of([4, 1, 3, 2]) == Spread(mean=2.5, p50=2.5, p95=pytest.approx(3.85), max=4)


def test_transitions_count_calls_that_are_followed_not_edges() -> None:
    runs = [DIAMOND, run(call("plan"), call("judge", "plan"), run_id="q")]

    found = {(t.before, t.after): (t.share, t.width) for t in analysis_of(*runs).transitions}

    assert found == {
        (START, "plan"): (1.0, 1.0),
        ("plan", "draft"): (0.5, 2.0),
        ("plan", "judge"): (0.5, 1.0),
        ("draft", "judge"): (1.0, 1.0),
        ("judge", END): (1.0, 1.0),
    }


def test_stages_are_summed_up_over_runs_with_and_without_them() -> None:
    analysis = analysis_of(DIAMOND, run(call("plan", output=4, prompt=300), run_id="q"))

    plan, draft, judge = analysis.stages
    assert (plan.stage, draft.stage, judge.stage) == ("plan", "draft", "judge")
    assert (draft.num_calls, draft.run_share, draft.calls_per_run.mean) == (2, 0.5, 1.0)
    assert (plan.output_tokens.mean, plan.prompt_tokens.max) == (3, 300)
    assert plan.prompt_share == pytest.approx(400 / 700)
    assert draft.output_share == pytest.approx(8 / 15)
    assert draft.gap_s.max == 0.5
    assert plan.service_s.max == 6.0


def test_stages_come_in_the_order_of_the_runs_not_of_the_first_one() -> None:
    short = run(call("a"), call("c", "a"))
    long = [run(call("a"), call("b", "a"), call("c", "b"), run_id=f"r{i}") for i in range(3)]

    assert [s.stage for s in analysis_of(short, *long).stages] == ["a", "b", "c"]


def test_calls_side_by_side_are_weighed_by_how_long_they_are() -> None:
    parallel = analysis_of(DIAMOND).parallelism

    assert parallel.peak.max == 2
    assert parallel.idle_share == pytest.approx(1.0 / 9.5)  # the gap before judge
    assert parallel.single_share == pytest.approx((2 + 0.5 + 2.5 + 1) / 9.5)
    assert parallel.mean[0] == 1
    assert parallel.mean[40] == 2  # 3.85 s
    assert parallel.mean[85] == 0  # 8.12 s


def test_a_prompt_shares_what_earlier_ones_began_with() -> None:
    runs = [
        run(call("a", prefix="tx"), call("b", prefix="tx"), call("c", prefix="ty")),
        run(call("d", prefix="txz"), call("e", prefix="xt"), run_id="q"),
    ]

    assert sharing(runs) == [
        [share(0, 0), share(20, 0), share(10, 0)],
        [share(0, 20), share(0, 0)],
    ]


def share(within: int, across: int) -> Sharing:
    return Sharing(
        num_within_tokens=within, num_across_tokens=across, num_new_tokens=100 - within - across
    )


def test_shares_of_sharing_are_of_prompt_tokens() -> None:
    analysis = analysis_of(
        run(call("a", prefix="t"), call("b", prefix="t", prompt=200)),
        run(call("a", prefix="t"), run_id="q"),
    )

    assert (analysis.within_share, analysis.across_share) == (10 / 400, 10 / 400)
    assert (analysis.stages[0].within_share, analysis.stages[0].across_share) == (0.0, 10 / 200)
    assert analysis.stages[1].within_share == 10 / 200


def test_the_stage_explains_what_does_not_vary_within_it() -> None:
    found = explained([call(f"a{i}", output=2) for i in range(3)] + [call("b", output=9)])

    assert found.by_stage == pytest.approx(1.0)
    assert found.by_prompt_length == pytest.approx(0.0)


def test_the_prompt_explains_what_grows_with_it() -> None:
    calls = [call(f"a{n}", prompt=n, output=1 + 2 * n) for n in (1, 2, 5)]

    assert explained(calls).by_prompt_length == pytest.approx(1.0)
    assert explained(calls).by_stage == pytest.approx(0.0)


def test_half_of_the_variance_explained_is_one_half() -> None:
    # Means 2 and 4 about 3: between stages 4, within 1 + 1 + 1 + 1.
    calls = [call("a1", output=1), call("a2", output=3), call("b1", output=3), call("b2", output=5)]

    assert explained(calls).by_stage == pytest.approx(0.5)


def test_equal_answers_have_nothing_to_explain() -> None:
    assert explained([call("a"), call("b")]).by_stage is None


def test_the_rest_is_told_by_the_mean_of_other_runs() -> None:
    runs = [chain(1, 2), chain(1, 4, run_id="q"), chain(1, 6, run_id="p")]

    plan, fix = remaining(runs, [alone(r) for r in runs], ["plan", "fix"])

    # After plan remain 2, 4, 6; told 5, 4, 3.
    assert (plan.mean_s, plan.error_by_stage_s) == (4.0, 2.0)
    assert plan.r2_by_stage == pytest.approx(1 - (9 + 0 + 9) / 8)
    assert (fix.mean_s, fix.error_by_stage_s, fix.r2_by_stage) == (0.0, 0.0, None)


def test_a_run_is_never_told_by_one_with_the_same_content() -> None:
    runs = [chain(1, 2), chain(1, 2, run_id="copy"), chain(1, 8, run_id="q")]

    (plan,) = remaining(runs, [alone(r) for r in runs], ["plan"])

    assert plan.error_by_stage_s == 6.0


def test_the_number_of_the_round_tells_more_than_the_stage() -> None:
    runs = [chain(1, 3, 3), chain(2, 3, 3, run_id="q")]

    (fix,) = remaining(runs, [alone(r) for r in runs], ["fix"])

    # Rests 3 and 0 in both runs: by stage 1.5 is told, by round the truth.
    assert (fix.error_by_stage_s, fix.error_by_round_s) == (1.5, 0.0)
    assert fix.r2_by_round == 1.0


def test_a_stage_that_no_other_run_has_cannot_be_told() -> None:
    runs = [chain(1, 2), run(call("other"), run_id="q")]

    assert remaining(runs, [alone(r) for r in runs], ["plan", "fix", "other"]) == []


def test_the_tail_divides_into_more_and_longer_calls() -> None:
    runs = [chain(2, 1), chain(2, 1), chain(2, 1), chain(4, 3, 3)]

    found = tail([alone(r) for r in runs])

    assert found is not None
    assert (found.num_slow, found.threshold_s) == (1, 10.0)
    assert (found.mean_slow_s, found.mean_rest_s) == (10.0, 3.0)
    fix, plan = found.causes
    assert (fix.stage, fix.num_calls_slow, fix.num_calls_rest) == ("fix", 2.0, 1.0)
    # Two calls of 3 s against one of 1 s: (2 - 1) * 2 and (3 - 1) * 1.5.
    assert (fix.more_calls_s, fix.longer_calls_s) == (2.0, 3.0)
    assert (plan.more_calls_s, plan.longer_calls_s) == (0.0, 2.0)
    assert found.gap_s == 0.0


def test_the_causes_of_the_tail_sum_to_its_excess() -> None:
    found = analyze(load("builtin:chase", 60, seed=1), PROFILE).tail

    assert found is not None
    assert found.num_slow == 3
    excess = sum(cause.total_s for cause in found.causes) + found.gap_s
    assert excess == pytest.approx(found.mean_slow_s - found.mean_rest_s)


def test_one_run_has_no_tail() -> None:
    analysis = analysis_of(DIAMOND)

    assert analysis.tail is None
    assert "slowest" not in report(analysis)
    assert "slowest" not in page(analysis)


def test_arrivals_are_told_as_a_rate() -> None:
    runs = [run(call("a"), run_id=f"r{i}", arrival_s=2.0 * i) for i in range(3)]

    assert analysis_of(*runs).arrival_rate == 0.5
    assert analysis_of(DIAMOND).arrival_rate is None


def test_the_report_shows_the_conditions_and_every_section() -> None:
    text = report(analyze(load("builtin:chess", 20, seed=0), PROFILE))

    assert "Trace: builtin:chess" in text
    assert "m (16 bit) on 1 x G; made up" in text
    assert "Note: Generated: CHESS on BIRD, revisions as recorded; seed 0." in text
    for title in ("Which stage", "Tokens per call", "critical path", "prefix cache", "slowest 5 %"):
        assert title in text


def test_the_report_of_many_stages_stays_readable() -> None:
    runs = [run(*(call(f"x{i}y", output=i + 1) for i in range(3 * MAX_ROWS)))]

    text = report(analysis_of(*runs))

    assert f"The first {MAX_ROWS} of {3 * MAX_ROWS} rows; --json has all." in text
    assert text.count("x100y") == 0


def test_names_from_a_trace_cannot_break_the_page() -> None:
    name = r"<b>$\frac$ & 查询"  # HTML, a formula that does not parse, letters not in the font
    runs = [run(call("a", stage=name), run_id=f"r{i}") for i in range(2)]

    html = page(analysis_of(*runs))

    assert "<b>" not in html
    assert r"&lt;b&gt;$\frac$ &amp; 查询" in html


def test_the_page_needs_no_other_file() -> None:
    html = page(analyze(load("builtin:mac", 20, seed=0), PROFILE))

    assert html.count("<svg") == 7
    assert "<script" not in html
    assert "<link" not in html
    assert " src=" not in html


def test_the_command_prints_and_writes_the_same_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "t.jsonl"
    write_trace(path, trace(chain(2, 1), chain(4, 3, 3, run_id="q"), chain(2, 1, run_id="copy")))

    outputs = ["--json", f"{tmp_path}/a.json", "--html", f"{tmp_path}/a.html"]
    hardware = ["--gpu", "L40S", "--model-shape", "llama-3.1-8b", "--tp", "1"]
    status = main(["analyze", str(path), "--distinct", *outputs, *hardware])

    printed = capsys.readouterr().out
    assert status == 0
    assert "Runs: 2, of which 0 repeat an earlier one" in printed
    assert "llama-3.1-8b (16 bit) on 1 x L40S" in printed
    written = json.loads((tmp_path / "a.json").read_text("utf-8"))
    assert written["num_runs"] == 2
    assert written["paths"]["output_tokens"]["max"] == 10
    assert "Analysis of tiny" in (tmp_path / "a.html").read_text("utf-8")


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["nowhere.jsonl"], "nowhere.jsonl: cannot read the trace"),
        (["builtin:chess", "--num-runs", "0"], "expected at least 1, got 0"),
        (["builtin:chess", "--gpu", "abacus"], "gpu: expected one of"),
        (["builtin:chess", "--html", "/nowhere/a.html"], "expected a file in an existing"),
    ],
)
def test_the_command_says_what_is_wrong(
    arguments: list[str], wanted: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["analyze", *arguments]) == 2
    assert wanted in capsys.readouterr().err
