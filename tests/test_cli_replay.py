"""`vllm-workflow replay`, and what the command does when nobody reads on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.builders import instance, stage_request
from vllm_workflow.cli.main import main
from vllm_workflow.core.config import PolicyConfig
from vllm_workflow.core.dispatcher import Dispatcher
from vllm_workflow.core.events import Event, to_json
from vllm_workflow.core.fleet import Fleet


def log_of_three_calls(path: Path) -> list[str]:
    events: list[Event] = []
    dispatcher = Dispatcher(Fleet(), PolicyConfig(), record=events.append)
    for name in ("a", "b"):
        dispatcher.add(instance(name))
        dispatcher.mark(name, healthy=True)
    for number in range(3):
        request = stage_request(request_id=str(number))
        dispatcher.submit(request, now=float(number), num_prompt_bytes=100)
    lines = [to_json(event) for event in events]
    path.write_text("".join(f"{line}\n" for line in lines), "utf-8")
    return lines


def test_what_was_decided_is_decided_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log_of_three_calls(tmp_path / "log")

    assert main(["replay", str(tmp_path / "log")]) == 0
    assert capsys.readouterr().out == "3 decisions, all as recorded\n"


def test_the_first_decision_that_differs_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "log"
    lines = log_of_three_calls(path)
    last = json.loads(lines[-1])
    last["decision"]["slack_s"] = 7.0
    path.write_text("\n".join([*lines[:-1], json.dumps(last)]), "utf-8")

    assert main(["replay", str(path)]) == 1
    assert capsys.readouterr().out.startswith("decision 3 differs\nrecorded: ")


@pytest.mark.parametrize("number", [-1, 0])
def test_a_log_with_a_line_twice_or_without_one_is_no_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    path = tmp_path / "log"
    lines = log_of_three_calls(path)
    marked = '{"event": "removed", "instance_id": "never added"}'
    path.write_text("\n".join([*lines, lines[-1] if number else marked]), "utf-8")

    assert main(["replay", str(path)]) == 2
    assert "expected a log without gaps" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["explain", "r"], ["replay"]])
def test_what_is_no_decision_log_is_called_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"run_id": "r", "workflow": "w", "calls": []}\n', "utf-8")

    assert main([*words, str(path)]) == 2
    assert "a decision log, whose first line is an event" in capsys.readouterr().err


def test_a_reader_that_leaves_ends_the_command_quietly() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "vllm_workflow.cli.main", "policies"],
            stdout=write_end,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    finally:
        os.close(write_end)

    assert (done.returncode, done.stderr) == (141, "")


def test_a_file_in_the_place_of_a_folder_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tokenizers")
    path = tmp_path / "file"
    path.write_text("x")

    assert main(["emulated-model", "llama-3.1-8b", str(path)]) == 2
    assert f"DIR: cannot write a folder '{path}': " in capsys.readouterr().err
