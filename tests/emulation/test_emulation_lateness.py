from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from vllm_workflow.emulation.lateness import MAX_LATE_SHARE, Lateness
from vllm_workflow.emulation.stats import HELP_TEXTS, samples
from vllm_workflow.emulation.timeline import Timeline
from vllm_workflow.vllm_metrics import SeriesFiles

INFO = {"gpu": 'a "quoted" GPU, le="0.5"', "time_scale": "2"}


class Server:
    """Engines whose series are on one `/metrics`."""

    def __init__(self, directory: Path, num_engines: int) -> None:
        self._directory = directory
        self.timelines = [Timeline(time_scale=1.0) for _ in range(num_engines)]
        self._files = [
            SeriesFiles(
                directory,
                {"model_name": "m", "engine": str(i)},
                part="emulated",
                help_texts=HELP_TEXTS,
            )
            for i in range(num_engines)
        ]

    def metrics(self) -> str:
        for timeline, files in zip(self.timelines, self._files):
            files.write(samples(timeline, INFO))
        registry = CollectorRegistry()
        MultiProcessCollector(registry, str(self._directory))
        return generate_latest(registry).decode()

    def close(self) -> None:
        for files in self._files:
            files.close()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[int], Server]]:
    with ExitStack() as servers:
        yield lambda num_engines: servers.enter_context(closing(Server(tmp_path, num_engines)))


@pytest.fixture
def server(start: Callable[[int], Server]) -> Server:
    return start(1)


def run(timeline: Timeline, *, num_steps: int, late_s: float, stalled_s: float = 0.0) -> None:
    """Steps of one second each, after whatever the timeline did before."""
    end = timeline.launch(1.0, 0.0, continues=False)
    timeline.handed_over(end, end + late_s)
    for _ in range(num_steps - 1):
        end = timeline.launch(1.0, end + stalled_s, continues=True)
        timeline.handed_over(end, end + late_s)


def test_a_run_is_what_was_added_between_two_looks(server: Server) -> None:
    run(server.timelines[0], num_steps=3, late_s=0.9)
    before = server.metrics()
    run(server.timelines[0], num_steps=10, late_s=0.004)

    lateness = Lateness.between(before, server.metrics())

    assert (lateness.num_steps, lateness.busy_s) == (10, 10.0)
    assert lateness.late_s == pytest.approx(0.04)
    assert lateness.worst_late_s == 0.005
    assert lateness.is_valid


def test_too_much_added_by_the_cpu_makes_a_run_invalid(server: Server) -> None:
    before = server.metrics()
    run(server.timelines[0], num_steps=11, late_s=0.06, stalled_s=0.06)

    lateness = Lateness.between(before, server.metrics())

    assert lateness.late_share == pytest.approx((11 * 0.06 + 10 * 0.06) / 11)
    assert lateness.late_share > MAX_LATE_SHARE
    assert not lateness.is_valid
    assert "INVALID: more than 10%" in str(lateness)


def test_the_engines_of_one_server_are_added_up(start: Callable[[int], Server]) -> None:
    server = start(2)
    before = server.metrics()
    for timeline in server.timelines:
        run(timeline, num_steps=5, late_s=0.001)

    lateness = Lateness.between(before, server.metrics())

    assert (lateness.num_steps, lateness.busy_s) == (10, 10.0)


def test_a_server_that_emulates_nothing_has_no_valid_run() -> None:
    lateness = Lateness.between("", "vllm:num_requests_running 3\n")

    assert not lateness.is_valid
    assert str(lateness) == "emulated GPU: no steps; INVALID"


def test_a_server_that_emulates_something_says_what(server: Server) -> None:
    text = server.metrics()

    (line,) = [x for x in text.splitlines() if x.startswith("vllm_workflow:emulated_gpu_info")]
    assert 'time_scale="2"' in line
    assert line.endswith(" 1.0")
