"""The plug-in in a real server with two seats."""

import http.client
import json
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.integration.vllm_process import (
    VllmServer,
    free_port,
    serve_command,
    serve_environment,
)

VLLM_FLAGS = ("--scheduler", "workflow", "--max-num-seqs", "2")


class Client:
    """Sends completions from threads and remembers the order in which they ended."""

    def __init__(self, server: VllmServer) -> None:
        self.server = server
        self.ended: list[str] = []
        self._pool = ThreadPoolExecutor(64)

    def complete(self, name: str, *, max_tokens: int, **body: Any) -> "Future[dict[str, Any]]":
        return self._pool.submit(self._complete, name, {"max_tokens": max_tokens, **body})

    def submit(self, function: Callable[..., None], *args: Any) -> "Future[None]":
        """Do something else in a thread of its own."""
        return self._pool.submit(function, *args)

    def post(self, body: dict[str, Any]) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(urlsplit(self.server.base_url).netloc, timeout=180)
        try:
            self._send(connection, body)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def stream(self, body: dict[str, Any]) -> http.client.HTTPConnection:
        """Start a streamed completion; closing the connection aborts it."""
        connection = http.client.HTTPConnection(urlsplit(self.server.base_url).netloc, timeout=180)
        self._send(connection, {"stream": True, **body})
        return connection

    @contextmanager
    def seats_taken(self, num_seats: int, **body: Any) -> Iterator[None]:
        """Keep seats busy until the block ends, however long that takes."""
        connections = [self.stream({"max_tokens": 8_000, **body}) for _ in range(num_seats)]
        try:
            await_requests(self.server, running=num_seats, waiting=0)
            yield
        finally:
            for connection in connections:
                connection.close()

    def close(self) -> None:
        self._pool.shutdown()

    def _complete(self, name: str, body: dict[str, Any]) -> dict[str, Any]:
        status, content = self.post(body)
        self.ended.append(name)
        assert status == 200, content
        answer: dict[str, Any] = json.loads(content)
        return answer

    @staticmethod
    def _send(connection: http.client.HTTPConnection, body: dict[str, Any]) -> None:
        defaults = {"model": "tiny", "prompt": "select", "ignore_eos": True, "temperature": 0}
        connection.request(
            "POST",
            "/v1/completions",
            json.dumps({**defaults, **body}),
            {"Content-Type": "application/json"},
        )


@pytest.fixture
def client(vllm_server: VllmServer) -> Iterator[Client]:
    client = Client(vllm_server)
    yield client
    client.close()
    await_requests(vllm_server, running=0, waiting=0)


def wf(**metadata: Any) -> dict[str, Any]:
    return {f"wf_{key}": value for key, value in metadata.items()}


def await_requests(server: VllmServer, *, running: int, waiting: int | None = None) -> None:
    """Wait until the server has that many requests; `waiting=None` is any number."""
    give_up = time.monotonic() + 60.0
    while True:
        seen = num_requests(server)
        if seen == (running, seen[1] if waiting is None else waiting):
            return
        assert time.monotonic() < give_up, f"still (running, waiting) = {seen}"
        threading.Event().wait(0.05)


def num_requests(server: VllmServer) -> tuple[int, int]:
    """Running and waiting, as vLLM itself counts them."""
    labels = '{engine="0",model_name="tiny"}'
    samples = server.metrics()
    running, waiting = (samples[f"vllm:num_requests_{x}{labels}"] for x in ("running", "waiting"))
    return int(running), int(waiting)


def num_tokens(answer: "Future[dict[str, Any]]") -> int:
    count: int = answer.result()["usage"]["completion_tokens"]
    return count


def test_an_urgent_call_takes_a_seat_and_no_token_is_lost(
    client: Client, vllm_server: VllmServer
) -> None:
    before = vllm_server.metric("vllm_workflow:preemptions_total", cause="seat")
    batch = [
        client.complete(f"batch-{i}", max_tokens=400, vllm_xargs=wf(budget_ms=600_000))
        for i in range(6)
    ]
    await_requests(vllm_server, running=2)

    urgent = client.complete("urgent", max_tokens=8, vllm_xargs=wf(id="run", budget_ms=4_000))

    assert num_tokens(urgent) == 8
    assert client.ended[0] == "urgent"
    assert [num_tokens(answer) for answer in batch] == [400] * 6
    assert vllm_server.metric("vllm_workflow:preemptions_total", cause="seat") > before


def test_many_preemptions_leave_every_token_count_exact(
    client: Client, vllm_server: VllmServer
) -> None:
    batch = [
        client.complete(f"batch-{i}", max_tokens=150 + i, vllm_xargs=wf(budget_ms=600_000))
        for i in range(8)
    ]
    urgent = []
    for i in range(20):
        body = {"vllm_xargs": wf(budget_ms=500)}
        urgent.append(client.complete(f"urgent-{i}", max_tokens=3 + i, **body))
        threading.Event().wait(0.05)

    assert [num_tokens(answer) for answer in urgent] == [3 + i for i in range(20)]
    assert [num_tokens(answer) for answer in batch] == [150 + i for i in range(8)]


def test_waiting_calls_run_in_the_order_of_their_slack(
    client: Client, vllm_server: VllmServer
) -> None:
    # Late calls are nobody's victims: they keep both seats while the others queue up.
    with client.seats_taken(2, vllm_xargs=wf(budget_ms=0)):
        for slack_s in (400, 300, 60, 50):
            body = {"vllm_xargs": wf(budget_ms=(slack_s + 100) * 1e3, rest_ms=100_000)}
            client.complete(f"slack-{slack_s}", max_tokens=600, **body)
        await_requests(vllm_server, running=2, waiting=4)
    client.close()

    assert set(client.ended[:2]) == {"slack-50", "slack-60"}
    assert set(client.ended[2:]) == {"slack-300", "slack-400"}


def test_a_call_that_is_too_late_steps_back_behind_those_that_are_not(
    client: Client, vllm_server: VllmServer
) -> None:
    before = vllm_server.metric("vllm_workflow:put_off_total")
    with client.seats_taken(2, vllm_xargs=wf(budget_ms=0)):
        client.complete("late", max_tokens=300, vllm_xargs=wf(budget_ms=0))
        for i in range(2):
            body = {"vllm_xargs": wf(budget_ms=60_000)}
            client.complete(f"on-time-{i}", max_tokens=600, **body)
        await_requests(vllm_server, running=2, waiting=3)
    client.close()

    assert client.ended[0] != "late"
    assert vllm_server.metric("vllm_workflow:put_off_total") > before


JUNK: list[Any] = [
    "",
    "x" * 10_000,
    -1,
    0,
    -(2**63),
    2**63,
    1e308,
    -1e308,
    [1, 2],
    ["a"] * 100,
    True,
    "NaN",
    "\u0000\ud83d",
]
TIMES = ["budget_ms", "rest_ms", "service_ms", "age_ms", "attained_ms", "attained_path_ms"]
KEYS = ["id", "name", "stage", "tenant", "final", *TIMES]


def test_a_storm_of_malformed_metadata_leaves_the_server_serving(
    client: Client, vllm_server: VllmServer
) -> None:
    before = vllm_server.metric("vllm_workflow:unreadable_metadata_total")
    answers = [
        client.complete("junk", max_tokens=2, vllm_xargs={f"wf_{key}": value})
        for key in KEYS
        for value in JUNK[:-1]
    ]
    everything = {f"wf_{key}": [1e308, "x"] for key in KEYS}
    answers += [client.complete("junk", max_tokens=2, vllm_xargs=everything) for _ in range(20)]
    refused = [
        client.post({"max_tokens": 2, "vllm_xargs": {"wf_budget_ms": value}})[0]
        for value in ({"nested": 1}, [[1]], None, float("nan"), float("inf"), 10**400, JUNK[-1])
    ]

    assert [num_tokens(answer) for answer in answers] == [2] * len(answers)
    # What JSON cannot say well, the API server refuses; the last one it cannot even encode.
    assert refused == [400, 400, 400, 200, 200, 400, 500]
    assert num_tokens(client.complete("good", max_tokens=5)) == 5
    assert vllm_server.metric("vllm_workflow:failures_total") == 0
    assert vllm_server.metric("vllm_workflow:unreadable_metadata_total") > before


def test_clients_that_hang_up_leave_nothing_behind(client: Client, vllm_server: VllmServer) -> None:
    for i in range(30):
        metadata = wf(budget_ms=(500 if i % 3 else 300_000))
        client.stream({"max_tokens": 900, "vllm_xargs": metadata}).close()

    await_requests(vllm_server, running=0, waiting=0)
    assert num_tokens(client.complete("after", max_tokens=5)) == 5
    assert vllm_server.metric("vllm_workflow:queue_depth") == 0


def test_the_servers_own_metrics_show_ours(client: Client, vllm_server: VllmServer) -> None:
    client.complete("met", max_tokens=1, vllm_xargs=wf(budget_ms=60_000)).result()
    client.complete("missed", max_tokens=1, vllm_xargs=wf(budget_ms=0)).result()

    labels = {"engine": "0", "model_name": "tiny"}
    assert vllm_server.metric("vllm_workflow:deadline_met_total", **labels) >= 1
    assert vllm_server.metric("vllm_workflow:deadline_missed_total", **labels) >= 1
    assert vllm_server.metric("vllm_workflow:slack_at_admission_seconds_count", **labels) >= 2
    assert vllm_server.metric("vllm_workflow:policy_info", **labels) == 1


def test_a_bad_policy_stops_the_server_in_one_clear_line(
    vllm_server: VllmServer, tiny_model: Path, tmp_path: Path
) -> None:
    path = tmp_path / "policy.json"
    path.write_text('{"ordering": "alphabetical"}', encoding="utf-8")
    environment = serve_environment() | {"VLLM_WORKFLOW_POLICY": str(path)}

    run = subprocess.run(
        serve_command(tiny_model, free_port(), "--scheduler", "workflow"),
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
    )

    assert run.returncode == 2
    last_line = run.stderr.strip().splitlines()[-1]
    assert f"{path}: ordering: expected one of" in last_line
