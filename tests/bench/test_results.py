from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.bench.builders import call_record, run_record
from vllm_workflow.bench.results import METRICS, parse_goodput, summarize, to_json_value
from vllm_workflow.bench.validity import Validity, judge
from vllm_workflow.core.errors import ConfigError
from vllm_workflow.emulation.lateness import Lateness


def failed(**fields: Any) -> Any:
    return run_record(call_record(error="status 500", status=500), **fields)


def test_figures_of_calls_and_of_runs_are_kept_apart() -> None:
    first = call_record("a", end_s=1.0)
    second = call_record("b", sent_s=1.0, first_token_s=1.2, end_s=4.0, token_times_s=(1.2, 4.0))

    figures = summarize([run_record(first, second)], percentiles=(50.0, 99.9))

    assert figures["mean_e2el_ms"] == 4000.0
    assert figures["calls_mean_e2el_ms"] == 2000.0
    assert figures["mean_ttft_ms"] == figures["calls_mean_ttft_ms"] == pytest.approx(350.0)
    assert figures["mean_tpot_ms"] == pytest.approx((250.0 + 1400.0) / 2)
    assert figures["median_itl_ms"] == pytest.approx(250.0)
    assert figures["p99.9_e2el_ms"] == 4000.0
    assert (figures["total_input_tokens"], figures["total_cached_tokens"]) == (80, 40)


def test_the_keys_of_vllm_bench_serve_are_there() -> None:
    figures = summarize([run_record()], percentiles=(99.0,))

    wanted = {
        *("duration", "completed", "failed", "total_input_tokens", "total_output_tokens"),
        *("request_throughput", "request_goodput", "output_throughput"),
        *("total_token_throughput", "max_output_tokens_per_s", "max_concurrent_requests"),
        *(f"{s}_{m}_ms" for m in METRICS for s in ("mean", "median", "std", "p99")),
        *(f"calls_{s}_{m}_ms" for m in METRICS for s in ("mean", "median", "std", "p99")),
    }
    assert wanted <= set(figures)


@given(st.lists(st.floats(0.1, 100.0), min_size=1, max_size=40))
def test_statistics_are_those_of_numpy(ends_s: list[float]) -> None:
    figures = summarize([run_record(call_record(end_s=end)) for end in ends_s])
    ms = 1000 * np.array(ends_s)

    assert figures["p95_e2el_ms"] == pytest.approx(np.percentile(ms, 95))
    assert figures["std_e2el_ms"] == pytest.approx(np.std(ms), abs=1e-6)


def test_a_failed_run_is_an_arrival_that_missed_at_every_scale() -> None:
    runs = [run_record(run_id=str(n), slo_s=2.0, reference_s=0.5) for n in range(3)]

    figures = summarize([*runs, failed(slo_s=2.0, reference_s=0.5)])

    assert (figures["completed"], figures["failed"]) == (3, 1)
    assert figures["slo_attainment"] == 0.75
    assert figures["slo_scale_at_95"] == math.inf
    assert figures["mean_e2el_ms"] == 1000.0  # of those that finished
    assert figures["request_goodput"] == figures["request_throughput"] == 3.0
    assert figures["errors"] == {"status 500": 1}


def test_the_scale_needed_is_that_of_the_reference() -> None:
    runs = [run_record(reference_s=1 / scale) for scale in range(1, 101)]

    figures = summarize(runs)

    assert figures["slo_scale_at_95"] == pytest.approx(95)
    assert figures["slo_scale_at_99"] == pytest.approx(99)
    assert figures["slo_attainment"] is None


def test_without_any_run_every_figure_is_none_and_no_zero_latency() -> None:
    figures = summarize([])

    assert {figures[f"{s}_{m}_ms"] for m in METRICS for s in ("mean", "median", "std", "p99")} == {
        None
    }
    assert figures["request_throughput"] is None
    assert figures["per_stage"] == figures["per_instance"] == []


def test_stages_and_instances_have_a_row_each_with_their_failures() -> None:
    run = run_record(
        call_record("a", instance="fast"),
        call_record("b", stage="a", instance="slow", sent_s=1.0, end_s=3.0),
        call_record("c", instance="", error="refused", sent_s=2.0, num_output_tokens=None),
    )

    figures = summarize([run])

    assert [(r["stage"], r["calls"], r["failed"]) for r in figures["per_stage"]] == [
        ("a", 2, 0),
        ("c", 1, 1),
    ]
    assert [(r["instance"], r["p50_e2el_ms"]) for r in figures["per_instance"]] == [
        ("fast", 1000.0),
        ("slow", 2000.0),
        ("unknown", None),
    ]


def test_goodput_counts_runs_whose_every_call_keeps_to_it() -> None:
    quick = run_record(call_record(first_token_s=0.1))
    slow_start = run_record(call_record("a", first_token_s=0.1), call_record("b"))

    def goodput(**most_ms: float) -> float:
        return float(summarize([quick, slow_start], goodput_ms=most_ms)["request_goodput"])

    assert goodput(ttft=200.0) == 1.0
    assert goodput(ttft=600.0) == 2.0
    assert goodput(ttft=600.0, e2el=900.0) == 0.0


@pytest.mark.parametrize("pair", ["e2el", "e2el:", "e2el:-1", "e2el:soon", "itl:5"])
def test_a_goodput_that_makes_no_sense_is_refused(pair: str) -> None:
    with pytest.raises(ConfigError, match="--goodput: expected KEY:MILLISECONDS"):
        parse_goodput([pair])


def test_the_busiest_second_and_the_most_runs_at_a_time_are_found() -> None:
    runs = [
        run_record(call_record(token_times_s=(0.5, 1.1, 1.2), num_output_tokens=6), run_id=name)
        for name in "ab"
    ]
    later = run_record(call_record(sent_s=1.0, end_s=2.0), arrival_s=1.0, run_id="c")

    assert summarize(runs)["max_output_tokens_per_s"] == 8
    assert summarize([*runs, later])["max_concurrent_requests"] == 2


def test_json_has_no_number_for_infinity() -> None:
    assert to_json_value({"a": math.inf, "b": [math.nan, (1,)]}) == {"a": "inf", "b": [None, [1]]}


def verdict(*runs: Any, cpu_share: float = 0.1, **emulated: Lateness) -> Validity:
    return judge(runs or (run_record(),), cpu_share=cpu_share, emulated=emulated)


def steps(late_share: float, busy_s: float = 10.0) -> Lateness:
    late_s = busy_s * late_share
    return Lateness(num_steps=10, busy_s=busy_s, stalled_s=0.0, late_s=late_s, worst_late_s=late_s)


def test_a_load_that_kept_up_is_valid() -> None:
    judged = verdict(server=steps(0.01))

    assert judged.is_valid
    assert judged.generator["p99_late_send_ms"] == 0.0
    assert judged.emulated_servers["server"]["late_share"] == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("judged", "reason"),
    [
        (verdict(run_record(call_record(sent_s=0.5))), "sent too late: 50.0%"),
        (verdict(cpu_share=0.97), "97% of a core"),
        (verdict(run_record(call_record(error="status 500"))), "no call was answered"),
        (verdict(run_record(call_record(has_trace_lengths=False))), "1 of 1 calls had another"),
        (
            verdict(server=steps(0.3)),
            "server: emulated GPU: 10 steps, 10.00 s of work, 30.0% added",
        ),
    ],
)
def test_a_load_that_did_not_keep_up_is_invalid_and_says_why(judged: Validity, reason: str) -> None:
    assert not judged.is_valid
    assert reason in " ".join(judged.reasons)


def test_an_emulated_gpu_that_did_nothing_cannot_vouch_for_anything() -> None:
    assert not verdict(server=steps(0.0, busy_s=0.0)).is_valid
