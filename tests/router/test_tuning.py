"""Online tuning: policies change while calls run, and nothing else does."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.builders import outcome, stage_request
from tests.fakes import FakeEngine
from tests.router.conftest import Routing
from tests.sim.tuner_builders import HEXGEN, fleet, logged
from vllm_workflow.core.config import PRESETS, PolicyConfig
from vllm_workflow.core.dispatcher import Dispatcher
from vllm_workflow.core.errors import ConfigError
from vllm_workflow.core.events import from_json
from vllm_workflow.core.fleet import Fleet
from vllm_workflow.core.replay import replay
from vllm_workflow.router import tuning
from vllm_workflow.router.binder import Binder
from vllm_workflow.router.config import RouterConfig
from vllm_workflow.router.metrics import Metrics
from vllm_workflow.router.tries import Tries
from vllm_workflow.router.tuner_config import TunerConfig
from vllm_workflow.router.tuning import PolicyFile, PolicySwitch, Tuning
from vllm_workflow.sim.policy_files import write_policy

pytestmark = pytest.mark.anyio

BLIND = replace(HEXGEN, alpha=0.0)
WORKFLOW = PRESETS["workflow"]


def switch(policy: PolicyConfig = BLIND) -> PolicySwitch:
    dispatcher = Dispatcher(Fleet(), policy)
    for each in fleet():
        dispatcher.add(each.instance)
    return PolicySwitch(dispatcher, Binder(dispatcher), Metrics())


def metric(of: PolicySwitch, name: str, **labels: str) -> float | None:
    return of.metrics.registry.get_sample_value(f"vllm_workflow:router_{name}", labels)


def tuner(tmp_path: Path, of: PolicySwitch, log: Path, **config: Any) -> Tuning:
    settings = {"policy_file": str(tmp_path / "policy.json"), "window_s": 1e5, **config}
    checked = TunerConfig.model_validate(settings)
    file = PolicyFile(Path(checked.policy_file), of)
    return Tuning(checked, log, of, file, workflows=[], store=None)


async def test_a_changed_file_is_taken_over(tmp_path: Path) -> None:
    path, of = tmp_path / "policy.json", switch()
    file = PolicyFile(path, of)

    write_policy(path, HEXGEN)
    await file.look()

    assert of.current == HEXGEN
    assert metric(of, "policy_swaps_total") == 1
    labels = {"policy": "hexgen", "dispatch": "hexgen", "ordering": "urgency"}
    assert metric(of, "policy_info", fingerprint=HEXGEN.fingerprint, **labels) == 1
    assert metric(of, "policy_info", fingerprint=BLIND.fingerprint, **labels) is None


async def test_what_the_file_held_before_is_not_taken_over(tmp_path: Path) -> None:
    path, of = tmp_path / "policy.json", switch()
    write_policy(path, HEXGEN)

    await PolicyFile(path, of).look()

    assert of.current == BLIND


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ('{"alpha": 7}', "policy.json: alpha: expected a number from 0 to 1, got 7.0; policy"),
        ('{"alpha', "policy.json: cannot read policy: "),
        ("", "policy.json: cannot read policy: "),
        ("[" * 100_000, "policy.json: cannot read policy: "),
        ('{"alpha": ' + "9" * 5000 + "}", "policy.json: cannot read policy: "),
    ],
)
async def test_a_broken_file_is_told_of_once_and_changes_nothing(
    text: str, error: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, of = tmp_path / "policy.json", switch()
    file = PolicyFile(path, of)
    path.write_text(text or " ", encoding="utf-8")

    await file.look()
    await file.look()

    assert of.current == BLIND
    (record,) = caplog.records
    assert error in record.getMessage()
    assert record.getMessage().endswith(f"policy {BLIND.fingerprint} stays")
    write_policy(path, HEXGEN)
    await file.look()
    assert of.current == HEXGEN


async def test_a_file_is_watched_on_whatever_its_policy_brings_about(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(PolicySwitch):
        def swap(self, policy: PolicyConfig) -> bool:
            raise RuntimeError("broken")

    path, of = tmp_path / "policy.json", switch()
    file = PolicyFile(path, Broken(of.dispatcher, of._binder, Metrics()))
    write_policy(path, HEXGEN)

    await file.look()

    (record,) = caplog.records
    assert record.exc_info
    assert "policy.json could not be taken over" in record.getMessage()


async def test_a_file_that_goes_away_changes_nothing(tmp_path: Path) -> None:
    path, of = tmp_path / "policy.json", switch()
    write_policy(path, HEXGEN)
    file = PolicyFile(path, of)
    path.unlink()

    await file.look()

    assert of.current == BLIND


async def test_calls_that_wait_are_woken_by_a_policy_under_which_they_can_start(
    tmp_path: Path,
) -> None:
    of = switch(WORKFLOW)
    binder = of._binder
    for number in range(4):
        of.dispatcher.submit(stage_request(f"running-{number}"), now=0.0)
    waiting = asyncio.create_task(
        binder.bind(
            stage_request("waiting", arrival_time=time.monotonic()),
            num_prompt_bytes=1,
            tries=Tries(lambda: None, 0.0, lambda instance_id: 0),
        )
    )
    while not len(of.dispatcher.waiting):
        await asyncio.sleep(0)
    of.dispatcher.settle(outcome("running-0", "fast"))  # without asking who can start now

    of.swap(replace(WORKFLOW, ordering="fcfs"))

    async with asyncio.timeout(5):
        assert (await waiting).request_id == "waiting"


async def test_a_better_policy_is_found_written_and_taken_over(tmp_path: Path) -> None:
    of = switch()
    history = tmp_path / "history.jsonl"
    log = logged(tmp_path / "log", BLIND)

    await tuner(tmp_path, of, log, history_file=str(history)).tune()

    assert of.current != BLIND
    assert of.current == PolicyConfig.from_file(tmp_path / "policy.json")
    assert metric(of, "tunings_total", verdict="swap") == 1
    (entry,) = map(json.loads, history.read_text(encoding="utf-8").splitlines())
    assert (entry["swap"], entry["policy"]) == (True, of.current.fingerprint)
    assert entry["incumbent"] == BLIND.fingerprint


async def test_a_policy_that_is_good_stays(tmp_path: Path) -> None:
    of = switch(replace(HEXGEN, alpha=0.9))
    log = logged(tmp_path / "log", of.current)

    await tuner(tmp_path, of, log, grid={"alpha": [0.0, 0.9]}).tune()

    assert of.current.alpha == 0.9
    assert not (tmp_path / "policy.json").exists()
    assert metric(of, "tunings_total", verdict="keep") == 1


@pytest.mark.parametrize(
    ("program", "config", "error"),
    [
        ("vllm_workflow.sim.nothing_of_that_name", {}, "exit status 1: .*No module named"),
        ("tests.router.kills_itself", {}, "exit status -9"),
        ("vllm_workflow.sim.tuner_process", {"timeout_s": 0.001}, "took over 0.001 s"),
        ("this", {}, "Expecting value"),  # it prints, but no verdict
    ],
)
async def test_a_tuning_that_fails_harms_nothing(
    program: str,
    config: dict[str, Any],
    error: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(tuning, "PROGRAM", program)
    of = switch()

    await tuner(tmp_path, of, logged(tmp_path / "log", BLIND, num_runs=3), **config).tune()

    assert of.current == BLIND
    assert metric(of, "tunings_total", verdict="failed") == 1
    assert caplog.records[-1].levelno == logging.ERROR
    assert re.search(f"tuning failed: .*{error}", caplog.records[-1].getMessage(), re.DOTALL)


async def test_its_process_runs_when_nothing_else_wants_to() -> None:
    """It lowers its priority before it reads its job, here one that never comes."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", tuning.PROGRAM, "7", "60", stdin=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(20):
            while os.getpriority(os.PRIO_PROCESS, process.pid) < os.nice(0) + 7:
                await asyncio.sleep(0.01)
    finally:
        process.kill()
        await process.wait()


async def test_its_process_ends_itself_when_nobody_else_does() -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", tuning.PROGRAM, "0", "-4.9", stdin=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(20):
        assert await process.wait() == -signal.SIGALRM


async def test_a_log_that_cannot_be_used_is_told_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    of = switch()

    await tuner(tmp_path, of, tmp_path / "nothing").tune()

    assert "tuning failed: exit status 2: " in caplog.text
    assert "nothing: cannot read the decision log: No such file" in caplog.text


async def test_a_router_stops_while_it_tunes(routing: Routing, tmp_path: Path) -> None:
    async with (
        FakeEngine().serving() as engine,
        routing(
            engine,
            decision_log=str(tmp_path / "log"),
            tuner={"interval_s": 0.001, "policy_file": str(tmp_path / "policy.json")},
        ) as client,
    ):
        async with client.post() as response:
            assert response.status == 200


async def test_a_policy_changes_in_a_running_router_and_its_log_replays(
    routing: Routing, tmp_path: Path
) -> None:
    log, path = tmp_path / "log", tmp_path / "policy.json"
    async with (
        FakeEngine().serving() as one,
        FakeEngine().serving() as two,
        routing(
            one, two, decision_log=str(log), tuner={"policy_file": str(path)}, set_priority=True
        ) as client,
    ):
        async with client.post() as response:
            assert response.status == 200
        write_policy(path, PRESETS["least-outstanding"])
        while True:
            async with client.get("/health") as response:
                if (await response.json())["policy"] == PRESETS["least-outstanding"].fingerprint:
                    break
        for _ in range(3):
            async with client.post() as response:
                assert response.status == 200

    events = [from_json(line) for line in log.read_text(encoding="utf-8").splitlines()]
    pairs = list(replay(events))
    assert [before == now for before, now in pairs] == [True] * 4
    policies = [before.policy for before, _ in pairs if before is not None]
    assert policies == ["predicted-finish", *["least-outstanding"] * 3]


async def test_switched_off_it_starts_no_process(
    routing: Routing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[object] = []
    real = asyncio.create_subprocess_exec
    monkeypatch.setattr(
        asyncio, "create_subprocess_exec", lambda *a, **k: (started.append(a), real(*a, **k))[1]
    )
    for config in ({}, {"tuner": {"enabled": False, "interval_s": 0.001}}):
        async with FakeEngine().serving() as engine:
            log = str(tmp_path / "log")
            async with routing(engine, decision_log=log, **config) as client:
                for _ in range(5):
                    async with client.post() as response:
                        assert response.status == 200

    assert started == []


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"tuner": {}}, "tuner: expected decision_log beside it, or store"),
        ({"tuner": {"speed": 1}, "decision_log": "x"}, "tuner.speed: unknown field"),
        ({"tuner": {"confidence": 2.0}, "decision_log": "x"}, "tuner.confidence: .* less than 1"),
        (
            {"tuner": {"grid": {"alpha": [3.0]}}, "decision_log": "x"},
            "tuner.grid: alpha: expected a number from 0 to 1, got 3.0",
        ),
    ],
)
async def test_a_configuration_that_cannot_be_used_is_explained(
    fields: dict[str, Any], error: str
) -> None:
    with pytest.raises(ConfigError, match=error):
        RouterConfig.from_mapping({"instances": [{"url": "http://a:1"}], **fields}, source="y")


async def test_files_of_the_tuner_lie_beside_router_yaml(tmp_path: Path) -> None:
    path = tmp_path / "router.yaml"
    path.write_text(
        "instances: [{url: 'http://a:1'}]\ndecision_log: d\ntuner: {history_file: h}\n",
        encoding="utf-8",
    )

    config = RouterConfig.from_file(path)

    assert config.tuner is not None
    assert config.tuner.policy_file == str(tmp_path / "policy.json")
    assert config.tuner.history_file == str(tmp_path / "h")
