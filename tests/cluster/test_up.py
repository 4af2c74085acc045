"""`vllm-workflow up` with real processes and real signals; only vLLM itself is a stand-in."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import yaml

from vllm_workflow.cluster.config import ClusterConfig
from vllm_workflow.cluster.process import last_error
from vllm_workflow.core.errors import ConfigError
from vllm_workflow.router.credentials import KeyHash, new_key

FAKE = Path(__file__).with_name("fake_server.py")
PATIENCE_S = 60.0

linux_only = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="affinity and orphans are Linux's"
)


def until(holds: Callable[[], Any], what: str, process: subprocess.Popen[str] | None = None) -> Any:
    """Poll until `holds` is true; return what it gave."""
    give_up = time.monotonic() + PATIENCE_S
    while time.monotonic() < give_up:
        if found := holds():
            return found
        if process is not None and process.poll() is not None:
            pytest.fail(f"ended before {what}: {process.communicate()}")
        time.sleep(0.02)
    pytest.fail(f"not within {PATIENCE_S:.0f} s: {what}")


def alive(pid: int) -> bool:
    """Whether a process runs; one that waits to be reaped does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


class Up:
    """A `cluster.yaml` of fake instances, and the command running on it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config: dict[str, Any] = {
            "command": [sys.executable, str(FAKE), "{port}", str(folder / "{id}.json")],
            "router": {"port": 0},
            "instances": [{"id": "a"}, {"id": "b"}],
            "stop_grace_s": 1.0,
        }
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> subprocess.Popen[str]:
        path = self.folder / "cluster.yaml"
        path.write_text(yaml.safe_dump(self.config), encoding="utf-8")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "vllm_workflow.cli.main", "up", str(path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        return self.process

    def run(self) -> tuple[int, str]:
        """Run to the end; return status and what was said."""
        out, err = self.start().communicate(timeout=PATIENCE_S)
        assert self.process
        return self.process.returncode, out + err

    def until_ready(self) -> str:
        """Return the address of the API."""
        process = self.start()
        assert process.stdout
        line = process.stdout.readline()
        assert line.startswith("ready: "), line + "".join(process.communicate())
        return line.split()[-1]

    def facts(self, name: str) -> dict[str, Any]:
        """What an instance says of itself."""
        path = self.folder / f"{name}.json"
        until(path.exists, f"{name} started", self.process)
        facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return facts

    def pids(self) -> list[int]:
        return [pid for name in "ab" for pid in self.facts(name)["pids"]]

    def log(self, name: str) -> str:
        return (self.folder / "logs" / f"{name}.log").read_text(encoding="utf-8")


@pytest.fixture
def up(tmp_path: Path) -> Iterator[Up]:
    up = Up(tmp_path)
    yield up
    if up.process:
        up.process.kill()
        up.process.wait()
        for pipe in (up.process.stdout, up.process.stderr):
            assert pipe
            pipe.close()
    started = [json.loads(path.read_text(encoding="utf-8")) for path in tmp_path.glob("?.json")]
    pids = [pid for facts in started for pid in facts["pids"]]
    until(lambda: not any(map(alive, pids)), "no process left over by a test")


def test_the_router_serves_what_the_instances_serve(up: Up) -> None:
    url = up.until_ready()

    with urllib.request.urlopen(f"{url}/models", timeout=10) as answer:
        models = json.load(answer)

    assert [model["id"] for model in models["data"]] == ["m"]


def test_a_router_that_wants_keys_is_waited_for_too(up: Up) -> None:
    key = new_key()
    up.config["router"]["auth"] = {"keys": [{"tenant": "t", "key_hash": str(KeyHash.of(key))}]}
    url = f"{up.until_ready()}/models"
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"})

    with urllib.request.urlopen(request, timeout=10) as answer:
        assert [model["id"] for model in json.load(answer)["data"]] == ["m"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_to_stop_it_ends_every_process_and_succeeds(up: Up, number: signal.Signals) -> None:
    up.until_ready()
    pids = up.pids()
    assert up.process
    assert all(map(alive, pids))

    up.process.send_signal(number)
    _, said = up.process.communicate(timeout=PATIENCE_S)

    assert up.process.returncode == 0
    assert f"stopped by {number.name}" in said
    assert not any(map(alive, pids)), "gone before the command is"


@linux_only
def test_killed_itself_it_leaves_nothing_behind(up: Up) -> None:
    url = up.until_ready()
    pids = up.pids()
    assert up.process

    up.process.kill()

    until(lambda: not any(map(alive, pids)), "every process gone, those out of the group too")
    port = int(url.removesuffix("/v1").rpartition(":")[2])
    until(lambda: _is_free(port), "the router gone")


def test_told_to_stop_while_instances_load_it_ends_them(up: Up) -> None:
    up.config["args"] = ["--hang"]
    process = up.start()
    pids = up.pids()

    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=PATIENCE_S)

    assert process.returncode == 0
    assert not any(map(alive, pids))


def test_an_instance_that_dies_while_loading_ends_all_and_is_explained_in_one_line(up: Up) -> None:
    up.config["instances"][1]["args"] = ["--die-with", "ValueError: no such weights"]

    status, said = up.run()

    errors = [line for line in said.splitlines() if "b ended" in line]
    assert status == 1
    assert len(errors) == 1
    assert "status 3" in errors[0]
    assert "ValueError: no such weights" in errors[0]
    assert str(up.folder / "logs" / "b.log") in errors[0]
    assert not any(map(alive, up.pids()))


def test_an_instance_that_dies_later_is_reported_and_the_router_goes_on(up: Up) -> None:
    url = up.until_ready()
    assert up.process
    assert up.process.stderr

    os.kill(up.facts("a")["pids"][0], signal.SIGKILL)

    line = ""
    while "a was killed" not in line:
        line = up.process.stderr.readline()
        assert line, "the command ended"
    assert "by signal 9" in line
    assert "goes on with b" in line
    with urllib.request.urlopen(f"{url}/models", timeout=10) as answer:
        assert answer.status == 200


def test_when_the_last_instance_dies_it_fails(up: Up) -> None:
    up.until_ready()
    assert up.process

    for name in "ab":
        os.kill(up.facts(name)["pids"][0], signal.SIGKILL)
    _, said = up.process.communicate(timeout=PATIENCE_S)

    assert up.process.returncode == 1
    assert "every instance has ended" in said


def test_ports_that_nobody_named_are_none_that_systems_give_out(up: Up) -> None:
    url = up.until_ready()

    assert int(url.rpartition(":")[2].partition("/")[0]) in range(20_000, 32_768)


@pytest.mark.parametrize("taken", ["instances.1.port", "router.port"])
def test_a_port_in_use_is_named_before_anything_starts(up: Up, taken: str) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as other:
        port = other.getsockname()[1]
        owner = up.config["router"] if taken == "router.port" else up.config["instances"][1]
        owner["port"] = port

        status, said = up.run()

    assert status == 2
    assert f"{taken}: cannot listen on 127.0.0.1:{port}" in said
    assert not (up.folder / "a.json").exists()


def test_a_mistake_in_the_routers_fields_is_found_before_an_instance_starts(up: Up) -> None:
    up.config["router"]["polcy"] = "hexgen"

    status, said = up.run()

    assert status == 1
    assert "polcy: unknown field" in said
    assert not (up.folder / "a.json").exists()


@linux_only
def test_an_instance_gets_its_cpus_niceness_gpus_environment_and_seats(up: Up) -> None:
    cpu = max(os.sched_getaffinity(0))
    up.config["env"] = {"SHARED": 1, "OVER": "all"}
    up.config["args"] = ["--max-num-seqs", "{port}"]
    up.config["instances"][0] |= {
        **{"cpus": [cpu], "nice": 5, "gpus": [2, 3], "env": {"OVER": "own"}},
        **{"port": _free_port(), "latency": {"weights_ms": 7}, "gpu": "H200"},
    }
    up.until_ready()

    facts = up.facts("a")

    assert facts["cpus"] == [cpu]
    assert facts["nice"] == os.nice(0) + 5
    assert facts["max_num_seqs"] == up.config["instances"][0]["port"]
    wanted = {
        "VLLM_CPU_OMP_THREADS_BIND": str(cpu),
        "CUDA_VISIBLE_DEVICES": "2,3",
        "SHARED": "1",
        "OVER": "own",
    }
    assert facts["env"] | wanted == facts["env"]
    router = yaml.safe_load((up.folder / "logs" / "router.yaml").read_text(encoding="utf-8"))
    assert router["instances"][0]["latency"] == {"weights_ms": 7}
    assert router["instances"][0]["gpu"] == "H200"


def test_no_more_instances_load_at_a_time_than_allowed(up: Up) -> None:
    up.config["start_parallel"] = 1
    up.config["instances"][0]["args"] = ["--hang"]
    up.start()
    up.facts("a")

    assert not (up.folder / "b.json").exists()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"instancs": []}, "instancs: unknown field"),
        ({"instances": []}, "instances: expected at least 1 of them"),
        ({"instances": [{"id": "a", "prot": 1}]}, "instances.0.prot: unknown field"),
        (
            {"instances": [{"id": "a", "nice": 40}]},
            r"instances.0.nice: expected at most 19",
        ),
        ({"instances": [{"id": "a", "cpus": []}]}, "instances.0.cpus: expected at least 1 of them"),
        ({"instances": [{"id": "a"}, {"id": "a"}]}, r"instances: id taken: \['a'\]"),
        ({"instances": [{"id": "router"}]}, r"instances: id taken: \['router'\]"),
        (
            {"instances": [{"id": "a", "port": 1}, {"id": "b", "port": 1}]},
            "instances: port declared twice",
        ),
        ({"router": {"instances": []}}, "router.instances: made from `instances`"),
        ({"router": {"tls": {}}}, "router.tls: not on one machine"),
        ({"model": None}, "instances.0.model: Field required, here or as `model`"),
        ({"model": "./none"}, "model: there is no directory .*/none"),
        ({"instances": [{"id": "a", "model": "./no"}]}, r"instances.0.model: there is no .*/no"),
        ({"model": "."}, "model: .* holds no config.json"),
    ],
)
def test_a_mistake_is_named_with_its_path(
    change: dict[str, Any], complaint: str, tmp_path: Path
) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump({"model": "name", "instances": [{"id": "a"}]} | change))

    with pytest.raises(ConfigError, match=rf"cluster.yaml: {complaint}"):
        ClusterConfig.from_file(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none.yaml: cannot read"):
        ClusterConfig.from_file(tmp_path / "none.yaml")


def test_seats_are_told_to_vllm_unless_the_command_is_ones_own() -> None:
    config = ClusterConfig.from_mapping(
        {
            "model": "name",
            "args": ["--dtype", "float32"],
            "instances": [
                {"id": "a", "max_num_seqs": 4, "args": "--seed 1"},
                {"id": "b", "max_num_seqs": 4, "command": "serve {port}"},
            ],
        },
        source="test",
    )

    a, b = (" ".join(config.words(instance)) for instance in config.instances)

    assert a == (
        "vllm serve {model} --port {port} --scheduler workflow "
        "--max-num-seqs 4 --dtype float32 --seed 1"
    )
    assert b == "serve {port} --dtype float32"


@pytest.mark.parametrize(
    ("lines", "cause"),
    [
        (["INFO up", "ValueError: bad weights", "bye"], "ValueError: bad weights"),
        (
            [
                "(EngineCore pid=7) ERROR 11-21 04:31:07 [core.py:1234] OSError: disk is full",
                "(APIServer pid=5) RuntimeError: Engine core failed. See root cause above.",
            ],
            "OSError: disk is full",
        ),
        (["vllm serve: error: unrecognized arguments: --x"], "unrecognized arguments: --x"),
        (
            ["ValidationError: 1 validation error for ModelConfig", "  Value error, too long", "x"],
            "1 validation error for ModelConfig: Value error, too long",
        ),
        (["only this", ""], "only this"),
        ([], "the log is empty"),
    ],
)
def test_the_line_of_a_log_that_says_why_is_found(
    lines: list[str], cause: str, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    log.write_text("\n".join(lines), encoding="utf-8")

    assert cause in last_error(log)


def _free_port() -> int:
    with closing(socket.create_server(("127.0.0.1", 0))) as probe:
        port: int = probe.getsockname()[1]
        return port


def _is_free(port: int) -> bool:
    with closing(socket.socket()) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        return probe.connect_ex(("127.0.0.1", port)) != 0
