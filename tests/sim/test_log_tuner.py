"""From a decision log to a verdict."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from tests.sim.tuner_builders import HEXGEN, fleet, logged
from vllm_workflow.cli.main import main
from vllm_workflow.core.config import PRESETS, PolicyConfig
from vllm_workflow.core.errors import ConfigError
from vllm_workflow.core.events import Apportioned, Swapped, to_json
from vllm_workflow.core.policy_grid import points
from vllm_workflow.core.tenants import TenantConfig, TenantsConfig
from vllm_workflow.sim.log_fit import as_fast, scaled, speeds
from vllm_workflow.sim.log_refused import RefusedRun, stand_ins
from vllm_workflow.sim.log_tuner import as_happened, tune_log
from vllm_workflow.sim.log_window import OVER_AFTER_S, read_window, sim_instance, tail_window
from vllm_workflow.sim.policy_files import append_history, write_policy
from vllm_workflow.sim.trace_decisions import LoggedRun
from vllm_workflow.sim.tuner import TunerSettings, tune
from vllm_workflow.sim.types import PrefixPart

BLIND = replace(HEXGEN, alpha=0.0)


def lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def test_a_window_has_the_runs_the_fleet_and_the_policy_of_the_log(tmp_path: Path) -> None:
    window = read_window(logged(tmp_path / "log", num_runs=20))

    assert [each.run.run_id for each in window.runs] == [f"run-{i}" for i in range(20)]
    assert [each.run.slo_s for each in window.runs] == [pytest.approx(4.0)] * 20
    assert window.instances == tuple(each.instance for each in fleet())
    assert (window.policy, window.first_policy) == (HEXGEN, HEXGEN)


def test_the_policy_is_the_one_that_was_swapped_in_last(tmp_path: Path) -> None:
    path = logged(tmp_path / "log", num_runs=5)
    with path.open("a", encoding="utf-8") as file:
        file.write(to_json(Swapped(now=99.0, policy=BLIND, fingerprint=BLIND.fingerprint)) + "\n")

    window = read_window(path)

    assert (window.policy, window.first_policy) == (BLIND, HEXGEN)


def test_a_window_goes_back_as_far_as_asked(tmp_path: Path) -> None:
    path = logged(tmp_path / "log", num_runs=60)

    window = read_window(path, window_s=20.0)

    assert 0 < len(window.runs) < 40
    assert 15.0 < window.duration_s <= 20.0


def test_runs_that_the_window_cuts_off_are_not_whole(tmp_path: Path) -> None:
    path = logged(tmp_path / "log", num_runs=60)

    window = read_window(path, window_s=20.0)

    cut = [each.run.run_id for each in window.runs if each.run.run_id not in window.whole]
    assert all(len(each.calls) == 2 for each in window.runs if each.run.run_id in window.whole)
    assert "run-59" not in cut  # its last call said so
    assert len(cut) < 5


def test_a_run_that_may_go_on_is_not_whole(tmp_path: Path) -> None:
    path = logged(tmp_path / "log", num_runs=5)
    open_ended = [line.replace('"final": true', '"final": false') for line in lines(path)]
    path.write_text("\n".join(open_ended) + "\n", encoding="utf-8")
    assert read_window(path).whole == frozenset()

    last = max(each.end_time for each in read_window(path).runs) + OVER_AFTER_S + 1.0
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"event": "polled", "now": last, "decisions": []}) + "\n")

    assert len(read_window(path).whole) == 5


def test_of_several_lives_the_last_counts(tmp_path: Path) -> None:
    before = logged(tmp_path / "before", BLIND, num_runs=9).read_text(encoding="utf-8")
    path = logged(tmp_path / "log", num_runs=4)
    path.write_text(before + path.read_text(encoding="utf-8"), encoding="utf-8")

    window = read_window(path)

    assert (len(window.runs), window.policy) == (4, HEXGEN)


def test_the_end_of_a_long_log_is_the_same_window(tmp_path: Path) -> None:
    path = logged(tmp_path / "log", num_runs=60)
    state = lines(path)[:3]

    whole = read_window(path, window_s=15.0)
    tail = tail_window(path, state, window_s=15.0)
    cut = tail_window(path, state, window_s=15.0, max_bytes=path.stat().st_size // 2)

    assert (tail.runs, tail.whole, tail.instances) == (whole.runs, whole.whole, whole.instances)
    assert (cut.runs, cut.whole) == (whole.runs, whole.whole)


def test_a_line_that_is_being_written_is_left_out(tmp_path: Path) -> None:
    path = logged(tmp_path / "log", num_runs=5)
    before = read_window(path)
    with path.open("a", encoding="utf-8") as file:
        file.write('{"event": "submitted", "no')

    assert read_window(path) == before


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.7])
def test_how_fast_instances_were_is_found_from_how_long_calls_took(
    factor: float, tmp_path: Path
) -> None:
    real = tuple(replace(each, actual=scaled(each.latency, factor)) for each in fleet())
    window = read_window(logged(tmp_path / "log", num_runs=80, rate=1.0, actual=real))

    found = speeds(window.runs, [sim_instance(i) for i in window.instances], HEXGEN)

    busy = [each for each in found.values() if each.num_calls >= 20]
    assert busy
    assert [each.factor for each in busy] == [pytest.approx(factor, rel=0.03)] * len(busy)
    assert all(each.error < 0.05 for each in busy)


def test_an_instance_without_calls_is_taken_to_be_as_configured(tmp_path: Path) -> None:
    window = read_window(logged(tmp_path / "log", num_runs=4))
    instances = [sim_instance(i) for i in window.instances]

    assert as_fast(instances, speeds(window.runs, instances, HEXGEN))[1].latency == (
        instances[1].latency
    )


def test_a_wrong_alpha_in_a_log_is_found(tmp_path: Path) -> None:
    log = read_window(logged(tmp_path / "log", BLIND))

    found = tune_log(log, points(BLIND, {"alpha": [0.3, 0.6, 0.9]}))

    assert found.verdict.swap, found.verdict.reason
    assert found.fit is not None
    assert found.fit.replayed.mean_s == pytest.approx(found.fit.happened.mean_s, rel=0.05)


def test_a_log_that_the_simulator_cannot_explain_changes_nothing(tmp_path: Path) -> None:
    """Calls took ten times as long or a tenth, for reasons that no speed explains."""
    path = logged(tmp_path / "log", BLIND)
    odd = [json.loads(line) for line in lines(path)]
    for number, event in enumerate(e for e in odd if e["event"] == "settled"):
        event["outcome"]["e2el_s"] *= (0.1, 1.0, 10.0)[number % 3]
    path.write_text("".join(json.dumps(event) + "\n" for event in odd), encoding="utf-8")

    found = tune_log(read_window(path), points(BLIND, {"alpha": [0.9]}))

    assert not found.verdict.swap
    assert found.verdict.reason.startswith("the replay does not fit: the median call")


def test_a_replay_that_nobody_can_judge_changes_nothing(tmp_path: Path) -> None:
    log = read_window(logged(tmp_path / "log", BLIND, num_runs=9))  # 18 calls, 20 are needed

    found = tune_log(log, points(BLIND, {"alpha": [0.9]}), TunerSettings(min_runs=5))

    assert found.fit is not None
    assert found.fit.error is None
    assert not found.verdict.swap
    assert found.verdict.reason == (
        "nobody can tell whether the replay fits: no instance has 20 calls, of 18 in all"
    )


REFUSING = replace(PRESETS["workflow"], admission="reject")


def test_runs_that_were_refused_come_again_in_a_replay(tmp_path: Path) -> None:
    log = read_window(logged(tmp_path / "log", REFUSING, num_runs=120, rate=8.0))
    assert len(log.refused) > 10
    assert len(log.runs) + len(log.refused) == 120

    window = as_happened(log)
    again = [run for run in window.runs if "~refused-" in run.run_id]
    arrivals = [run.arrival_s for run in window.runs]

    assert len(window.runs) == 120
    assert arrivals == sorted(arrivals)  # type: ignore[type-var]
    assert [run.arrival_s for run in again] == pytest.approx(
        [each.arrival_time - log.runs[0].arrival_time for each in log.refused]
    )
    assert all(len(run.calls) == 2 and run.slo_s == pytest.approx(4.0) for run in again)
    assert len({run.run_id for run in window.runs}) == 120


def test_a_log_of_a_router_that_refuses_runs_is_tuned_on(tmp_path: Path) -> None:
    log = read_window(logged(tmp_path / "log", REFUSING, num_runs=120, rate=8.0))

    found = tune_log(log, points(REFUSING, {"max_hold_share": [0.0, 0.5]}))

    assert found.fit is not None
    assert found.verdict.num_runs == 120
    present = next(p for p in found.verdict.points if p.policy == REFUSING)
    assert present.score.attainment is not None
    assert present.score.attainment < 0.9


def test_a_client_that_left_was_not_refused(tmp_path: Path) -> None:
    path = logged(tmp_path / "log", REFUSING, num_runs=120, rate=8.0)
    path.write_text(path.read_text().replace('"refused": true', '"refused": false'))

    assert read_window(path).refused == ()


def test_a_stand_in_is_like_the_refused_run_and_shares_what_all_share(tmp_path: Path) -> None:
    log = read_window(logged(tmp_path / "log", num_runs=2))
    short, long = log.runs
    template, own = PrefixPart(part_id="t", num_tokens=9), PrefixPart(part_id="o", num_tokens=9)

    def with_parts(logged_run: LoggedRun, *parts: PrefixPart, slo_s: float) -> LoggedRun:
        calls = tuple(replace(call, prefix=parts) for call in logged_run.run.calls)
        return replace(logged_run, run=replace(logged_run.run, calls=calls, slo_s=slo_s))

    donors = [with_parts(short, template, slo_s=4.0), with_parts(long, template, own, slo_s=40.0)]
    came = RefusedRun(arrival_time=7.0, workflow=short.run.workflow, tenant="", slo_s=30.0)
    one, other = stand_ins([came, came], donors)

    assert one.slo_s == 30.0
    for each in (one, other):
        first, second = each.calls[0].prefix
        assert first == template
        assert second.part_id != own.part_id
    assert one.calls[0].prefix != other.calls[0].prefix
    assert stand_ins([came], []) == ()


def test_tenants_of_the_log_are_in_its_replay(tmp_path: Path) -> None:
    path = logged(tmp_path / "log", num_runs=20)
    narrow = TenantsConfig(default=TenantConfig(max_concurrent_runs=1))
    with path.open("a", encoding="utf-8") as file:
        file.write(to_json(Apportioned(now=99.0, tenants=narrow)) + "\n")

    window = as_happened(read_window(path))
    kept = tune(window, HEXGEN, [BLIND], TunerSettings(min_runs=5))
    free = tune(replace(window, tenants=None), HEXGEN, [BLIND], TunerSettings(min_runs=5))

    assert window.tenants == narrow
    assert [point.score for point in kept.points] != [point.score for point in free.points]


def test_the_command_prints_writes_and_keeps_a_history(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = logged(tmp_path / "log", BLIND)
    policy, history = tmp_path / "policy.json", tmp_path / "history.jsonl"
    words = ["tune", str(path), "--grid", "alpha=0.5,0.9", "--history", str(history)]

    assert main([*words, "--output", str(policy)]) == 0
    printed = capsys.readouterr().out
    assert main([*words, "--json"]) == 0
    as_json = json.loads(capsys.readouterr().out)

    assert "SWAP: gain +" in printed
    assert "(present policy)" in printed
    tuned = PolicyConfig.from_file(policy)
    assert tuned.alpha in {0.5, 0.9}
    assert as_json["policy"] == tuned.fingerprint
    first, second = (json.loads(line) for line in lines(history))
    assert first.pop("time").endswith("+00:00")
    assert second["points"] == first["points"] == as_json["points"]


@pytest.mark.parametrize(
    ("text", "words", "error"),
    [
        ("[1]\n", [], r"log:1: expected an object"),
        ('{"event": "added"}\n', [], r"log: expected an event 'started' before all others"),
        ('{"run_id": "x"}\n', [], r"log:1: expected a decision log, whose first line"),
        ('{"event": "started", "policy": {"alpha": 9}}\n', [], r"log:1: .*alpha"),
        ("GOOD", ["--grid", "alpha"], r"--grid: expected FIELD=VALUE,…, got 'alpha'"),
        ("GOOD", ["--grid", "alpha=7"], r"--grid: alpha: expected a number from 0 to 1"),
        ("GOOD", ["--window-s", "0"], r"--window-s: expected a number above 0, got 0"),
        ("GOOD", ["--confidence", "1"], r"confidence: expected a number above 0.5 and below 1"),
        ("GOOD", ["--policy", "nobody"], r"--policy: unknown policy 'nobody'"),
    ],
)
def test_what_cannot_be_used_is_named(
    text: str, words: list[str], error: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "log"
    if text == "GOOD":
        logged(path, num_runs=3)
    else:
        path.write_text(text, encoding="utf-8")

    assert main(["tune", str(path), *words]) == 2

    assert re.search(error, capsys.readouterr().err)


def test_a_bad_field_is_named_with_file_and_line(tmp_path: Path) -> None:
    path = logged(tmp_path / "log", num_runs=3)
    number = next(i for i, line in enumerate(lines(path), 1) if '"settled"' in line)
    event = json.loads(lines(path)[number - 1])
    event["outcome"]["e2el_s"] = "soon"
    broken = [*lines(path)[: number - 1], json.dumps(event), *lines(path)[number:]]
    path.write_text("\n".join(broken) + "\n", encoding="utf-8")

    with pytest.raises(ConfigError, match=rf"log:{number}: outcome\.e2el_s: expected a number"):
        read_window(path)


def test_a_policy_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    write_policy(path, HEXGEN)
    inode = path.stat().st_ino

    write_policy(path, PRESETS["workflow"])

    assert path.stat().st_ino != inode  # another file took its name
    assert PolicyConfig.from_file(path) == PRESETS["workflow"]
    assert [each.name for each in tmp_path.iterdir()] == ["policy.json"]


def test_a_history_does_not_grow_without_end(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    for number in range(7):
        append_history(path, {"number": number}, max_entries=3)

    assert [json.loads(line)["number"] for line in lines(path)] == [4, 5, 6]


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none/policy.json: cannot write: No such file"):
        write_policy(tmp_path / "none" / "policy.json", HEXGEN)
