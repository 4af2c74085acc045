"""What if the fleet, the load, the promises or the policy were others."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from tests.sim.tuner_builders import HEXGEN, fleet, logged, runs
from vllm_workflow.cli.main import main
from vllm_workflow.core.errors import ConfigError
from vllm_workflow.sim.what_if import (
    Comparison,
    Scenario,
    added,
    compare,
    faster,
    promised,
    removed,
)

BLIND = replace(HEXGEN, alpha=0.0)


def scenario(rate: float = 2.0, slo_s: float | None = 2.0) -> Scenario:
    return Scenario(
        runs=tuple(runs(40, rate=rate, slo_s=slo_s)),
        fleet=fleet(),
        policy=replace(HEXGEN, alpha=0.9),
    )


def by_metric(found: list[Comparison]) -> dict[str, Comparison]:
    return {each.metric: each for each in found}


def test_what_does_not_change_makes_no_difference() -> None:
    found = compare(scenario(), scenario())

    assert {(each.difference.low, each.difference.high) for each in found} == {(0.0, 0.0)}


def test_without_the_fast_instance_runs_take_longer() -> None:
    now = scenario()

    found = by_metric(compare(now, replace(now, fleet=removed(now.fleet, "fast"))))

    assert found["mean_s"].difference.low > 0.0
    assert found["attainment"].difference.high < 0.0
    assert found["mean_s"].difference.mean == pytest.approx(
        found["mean_s"].then.mean - found["mean_s"].now.mean
    )


def test_tighter_promises_are_met_less_often_and_runs_take_as_long() -> None:
    now = replace(scenario(), policy=replace(HEXGEN, ordering="fcfs", alpha=0.9))

    found = by_metric(compare(now, replace(now, runs=promised(now.runs, 0.3))))

    assert found["attainment"].difference.high < 0.0
    assert found["p95_s"].difference.mean == 0.0


def test_at_twice_the_rate_more_runs_are_served_and_each_takes_longer() -> None:
    now = scenario(slo_s=60.0)

    found = by_metric(compare(now, replace(now, runs=faster(now.runs, 2.0))))

    assert found["mean_s"].difference.low > 0.0
    assert found["goodput"].difference.mean > 0.0


def test_another_policy_is_held_against_the_present_one() -> None:
    now = scenario()

    found = by_metric(compare(now, replace(now, policy=BLIND)))

    assert found["mean_s"].difference.low > 0.0


def test_without_promises_there_is_no_attainment() -> None:
    assert "attainment" not in by_metric(compare(scenario(slo_s=None), scenario(slo_s=None)))


def test_an_instance_of_a_name_that_is_taken_gets_the_next_number() -> None:
    names = [
        replace(each, instance=replace(each.instance, instance_id=name))
        for each, name in zip(fleet(), ("l40s-0", "l40s-1"))
    ]

    found = added(names, names[:1])

    assert [each.instance.instance_id for each in found] == ["l40s-0", "l40s-1", "l40s-2"]


@pytest.mark.parametrize(
    ("what", "left"), [("fast", ["slow"]), ("SLOW", ["fast"]), ("s:1", ["fast"])]
)
def test_instances_are_removed_by_name_or_by_what_it_begins_with(
    what: str, left: list[str]
) -> None:
    assert [each.instance.instance_id for each in removed(fleet(), what)] == left


@pytest.mark.parametrize(
    ("what", "error"),
    [
        ("H100", "remove: expected 1 × 'H100' in the fleet, got ['fast', 'slow']"),
        ("fast:2", "remove: expected 2 × 'fast' in the fleet"),
        ("fast:x", "remove: expected GPU:COUNT or the name of an instance, got 'fast:x'"),
        ("", "remove: expected 1 × '' in the fleet"),
    ],
)
def test_what_is_not_there_cannot_be_removed(what: str, error: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(error)):
        removed(fleet(), what)


def test_the_last_instance_stays() -> None:
    with pytest.raises(ConfigError, match="expected an instance to be left"):
        removed(fleet()[:1], "fast")


def test_the_command_answers_for_a_generator(capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "simulate",
        "builtin:mac",
        "--num-runs",
        "20",
        "--request-rate",
        "1",
        "--replicates",
        "2",
    ]

    assert main([*words, "--add", "L40S", "--remove", "A100", "--slo-scale", "0.5"]) == 0
    said = capsys.readouterr().out
    assert main([*words, "--policy", "round-robin", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)

    assert "what if: a100-1, a6000-0, l40s-0, l40s-1; " in said
    assert re.search(r"attainment +1 .*\([-+\d.e]+ to [-+\d.e]+\)", said)
    assert found["now"]["fingerprint"] != found["what_if"]["fingerprint"]
    assert found["metrics"]["mean_s"]["difference"]["mean"] > 0.0


def test_the_command_answers_for_a_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(logged(tmp_path / "log", num_runs=40))

    assert main(["simulate", path, "--remove", "fast", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)

    assert found["what_if"]["instances"] == ["slow"]
    assert found["now"]["fingerprint"] == HEXGEN.fingerprint
    assert found["metrics"]["attainment"]["difference"]["mean"] < 0.0


def test_what_is_added_to_a_log_s_fleet_has_to_say_what_it_serves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(logged(tmp_path / "log", num_runs=40))
    words = ["simulate", path, "--add", "L40S"]

    assert main(words) == 2
    assert "--add: expected --model-shape beside it" in capsys.readouterr().err
    assert main([*words, "--model-shape", "llama-3.1-8b", "--replicates", "2"]) == 0


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["builtin:mac"], "--request-rate: expected a number, since builtin:mac has no arrivals"),
        (["builtin:nobody", "--request-rate", "1"], "workload: expected a file or one of"),
        (
            ["builtin:mac", "--request-rate", "1", "--rate-scale", "0"],
            "rate scale: expected a finite",
        ),
        (
            ["builtin:mac", "--request-rate", "1", "--slo-scale", "-1"],
            "SLO scale: expected a finite",
        ),
        (["builtin:mac", "--request-rate", "1", "--add", "Z80"], "Z80"),
        (
            ["builtin:mac", "--request-rate", "1", "--replicates", "1"],
            "replicates: expected an int",
        ),
        (["no-such-file"], "no-such-file: cannot read"),
    ],
)
def test_what_cannot_be_simulated_is_explained(
    words: list[str], error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["simulate", *words]) == 2
    assert error in capsys.readouterr().err
