"""Rows and pairs of a comparison."""

from __future__ import annotations

import math
from typing import Any

import pytest

from vllm_workflow.bench.compare import Options
from vllm_workflow.bench.compare_jobs import Job, Sample, Setting, Variant
from vllm_workflow.bench.compare_policies import by_attainment, entries
from vllm_workflow.bench.compare_rows import geometric_mean, interval, pair, row_of
from vllm_workflow.core.config import PolicyConfig

SETTING = Setting(trace="builtin:chess", rate=1.0, load=0.5, slo_scale=2.0, slo_s=None)
JOB = Job(
    setup=Options().setup, setting=SETTING, variant=Variant(policy=PolicyConfig()), seed=3, level=1
)


def sample(*latencies_s: float, slo_s: float = 10.0, reference_s: float = 5.0) -> Sample:
    n = len(latencies_s)
    return Sample(
        arrivals=tuple(float(i) for i in range(n)),
        latencies_s=latencies_s,
        references_s=(reference_s,) * n,
        slos_s=(slo_s,) * n,
        decision_us=None,
    )


def row(policy: str, seed: int, **columns: Any) -> dict[str, Any]:
    setting = {"trace": "t", "rate": 1.0, "load": None, "slo_scale": None}
    return {"policy": policy, "seed": seed, **setting, **columns}


def test_attainment_counts_every_arrival_and_one_that_never_ended_misses() -> None:
    found = row_of("workflow", JOB, sample(9.0, 10.0, 11.0, math.inf))

    assert (found["arrived"], found["finished"], found["failed"]) == (4, 3, 1)
    assert found["attainment"] == 0.5


def test_the_slo_scale_is_a_multiple_of_the_reference_over_all_arrivals() -> None:
    found = row_of("workflow", JOB, sample(*[5.0] * 19, 20.0))

    assert (found["slo_scale_at_95"], found["slo_scale_at_99"]) == (1.0, 4.0)


def test_goodput_is_the_share_of_throughput_that_was_on_time() -> None:
    found = row_of("workflow", JOB, sample(*[0.5] * 6, *[0.25] * 5, slo_s=0.3))

    assert found["throughput"] == pytest.approx(9 / 9.0)
    assert found["goodput"] == pytest.approx(4 / 9.0)


def test_a_pair_is_the_geometric_mean_of_ratios_seed_by_seed() -> None:
    ours = [row("a", 0, p95_s=10.0), row("a", 1, p95_s=40.0)]
    theirs = [row("b", 1, p95_s=20.0), row("b", 0, p95_s=20.0)]

    found = pair(ours, theirs, "p95_s")

    assert (found["policy"], found["against"], found["seeds"]) == ("a", "b", 2)
    assert found["ratio"] == pytest.approx(1.0)  # of 0.5 and 2
    assert found["ci_low"] == pytest.approx(0.5)
    assert found["ci_high"] == pytest.approx(2.0)


@pytest.mark.parametrize("value", [None, 0.0, math.inf])
def test_a_ratio_to_nothing_is_none(value: float | None) -> None:
    found = pair([row("a", 0, goodput=1.0)], [row("b", 0, goodput=value)], "goodput")

    assert (found["ratio"], found["ci_low"], found["seeds"]) == (None, None, 0)


def test_a_ratio_of_nothing_attained_is_zero() -> None:
    found = pair([row("a", 0, attainment=0.0)], [row("b", 0, attainment=0.5)], "attainment")

    assert (found["ratio"], found["ci_low"], found["ci_high"]) == (0.0, 0.0, 0.0)


def test_the_interval_holds_the_mean_and_is_the_same_every_time() -> None:
    values = [0.7, 0.8, 0.75, 0.9, 0.72]

    low, high = interval(values)

    assert min(values) <= low < geometric_mean(values) < high <= max(values)
    assert interval(values) == (low, high)


def test_equal_seeds_leave_no_interval() -> None:
    assert interval([0.5] * 5) == (pytest.approx(0.5), pytest.approx(0.5))


def test_of_equal_attainment_the_smaller_p95_is_better() -> None:
    assert by_attainment([sample(1.0, 1.0)]) < by_attainment([sample(1.0, 2.0)])
    assert by_attainment([sample(1.0, 9.0)]) < by_attainment([sample(1.0, 11.0)])


def test_the_paper_s_four_policies_are_among_the_baselines() -> None:
    names = {entry.name for entry in entries(["baselines"])}

    assert names >= {"round-robin+fcfs", "round-robin+urgency", "hexgen+fcfs", "hexgen+urgency"}


def test_a_policy_that_is_named_twice_is_compared_once() -> None:
    found = entries(["workflow", "baselines", "workflow", "hexgen+fcfs"])

    assert len({entry.name for entry in found}) == len(found)


def test_the_search_over_alpha_holds_the_ends_and_the_default() -> None:
    (oracle,) = entries(["hexgen-oracle+urgency"])

    alphas = [variant.policy.alpha for variant in oracle.variants]
    assert alphas[0] == 0.0
    assert alphas[-1] == 1.0
    assert PolicyConfig().alpha in alphas
