import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from tests.engine.engine_builders import build_request, run_step
from vllm_workflow import vllm_metrics
from vllm_workflow.engine.stats import EngineStats, StatsPublisher

Make = Callable[..., Any]
LABELS = {"model_name": "m", "engine": "0"}


@pytest.fixture
def publisher(tmp_path: Path) -> Iterator[StatsPublisher]:
    with closing(StatsPublisher(tmp_path, LABELS)) as publisher:
        yield publisher


def scrape(directory: Path) -> str:
    registry = CollectorRegistry()
    MultiProcessCollector(registry, str(directory))
    return generate_latest(registry).decode()


def test_every_series_is_there_from_the_start(publisher: StatsPublisher, tmp_path: Path) -> None:
    publisher.publish(EngineStats(), "abc123")

    text = scrape(tmp_path)

    for series in (
        'vllm_workflow:queue_depth{engine="0",model_name="m"} 0.0',
        'vllm_workflow:deadline_missed_total{engine="0",model_name="m"} 0.0',
        'vllm_workflow:deadline_met_total{engine="0",model_name="m"} 0.0',
        'vllm_workflow:preemptions_total{cause="seat",engine="0",model_name="m"} 0.0',
        'vllm_workflow:preemptions_total{cause="kv",engine="0",model_name="m"} 0.0',
        'vllm_workflow:capped_prefills_total{engine="0",model_name="m"} 0.0',
        'vllm_workflow:unreadable_metadata_total{engine="0",model_name="m"} 0.0',
        'vllm_workflow:failures_total{engine="0",model_name="m"} 0.0',
        'vllm_workflow:policy_info{engine="0",fingerprint="abc123",model_name="m"} 1.0',
        'vllm_workflow:slack_at_admission_seconds_count{engine="0",model_name="m"} 0.0',
    ):
        assert series in text


def test_a_gauge_shows_its_last_value_and_a_counter_its_total(
    publisher: StatsPublisher, tmp_path: Path
) -> None:
    stats = EngineStats()
    stats.queue_depth = 5
    publisher.publish(stats, "f")
    stats.queue_depth = 0
    stats.preemptions["seat"] += 3
    publisher.publish(stats, "f")

    text = scrape(tmp_path)

    assert 'queue_depth{engine="0",model_name="m"} 0.0' in text
    assert 'preemptions_total{cause="seat",engine="0",model_name="m"} 3.0' in text


def test_slack_is_a_histogram_that_reaches_below_zero(
    publisher: StatsPublisher, tmp_path: Path
) -> None:
    stats = EngineStats()
    for slack_s in (-1_000.0, -1.0, 0.0, 3.0, 1e9):
        stats.observe_slack(slack_s)
    publisher.publish(stats, "f")

    text = scrape(tmp_path)

    def bucket(bound: str) -> float:
        (line,) = [x for x in text.splitlines() if f'le="{bound}"' in x]
        return float(line.rpartition(" ")[2])

    assert (bucket("-60.0"), bucket("0.0"), bucket("5.0")) == (1.0, 3.0, 4.0)
    assert bucket("+Inf") == 5.0


def test_several_engines_have_several_series(tmp_path: Path) -> None:
    with ExitStack() as publishers:
        for engine in ("0", "1"):
            stats = EngineStats()
            stats.queue_depth = int(engine) + 7
            publisher = StatsPublisher(tmp_path, {"model_name": "m", "engine": engine})
            publishers.enter_context(closing(publisher)).publish(stats, "f")
        text = scrape(tmp_path)

    assert 'queue_depth{engine="0",model_name="m"} 7.0' in text
    assert 'queue_depth{engine="1",model_name="m"} 8.0' in text


def test_an_engine_that_ends_takes_its_series_along(tmp_path: Path) -> None:
    publisher = StatsPublisher(tmp_path, LABELS)
    publisher.publish(EngineStats(), "f")

    publisher.close()

    assert list(tmp_path.iterdir()) == []


def test_a_broken_file_does_not_break_the_scrape(tmp_path: Path) -> None:
    (tmp_path / "counter_workflow-1.db").write_bytes(b"")

    assert list(vllm_metrics._Collector(str(tmp_path)).collect()) == []


def test_a_scheduler_publishes_the_end_of_the_last_request(
    make_scheduler: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(vllm_metrics.DIRECTORY_ENV, str(tmp_path))
    scheduler = make_scheduler(num_seats=1)
    for request_id in ("a", "b"):
        request = build_request(request_id, max_tokens=2, wf_budget_ms=9_000, wf_rest_ms="x")
        scheduler.add_request(request)

    for _ in range(6):
        run_step(scheduler)

    text = scrape(tmp_path)
    assert "vllm_workflow:deadline_met_total{" in text
    (met,) = [x for x in text.splitlines() if x.startswith("vllm_workflow:deadline_met_total")]
    (depth,) = [x for x in text.splitlines() if x.startswith("vllm_workflow:queue_depth")]
    (junk,) = [x for x in text.splitlines() if x.startswith("vllm_workflow:unreadable_metadata_t")]
    assert (met[-4:], depth[-4:], junk[-4:]) == (" 2.0", " 0.0", " 2.0")
    scheduler.shutdown()
    assert list(tmp_path.iterdir()) == []


def test_without_a_place_to_publish_an_engine_still_runs(
    make_scheduler: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(vllm_metrics.DIRECTORY_ENV, "/no/such/directory")
    scheduler = make_scheduler()
    scheduler.add_request(build_request("a", wf_budget_ms=1))

    assert run_step(scheduler).total_num_scheduled_tokens == 16


def test_the_api_process_serves_a_private_directory_and_removes_it() -> None:
    code = """
import os
from prometheus_client import REGISTRY, generate_latest
from vllm_workflow import vllm_metrics
from vllm_workflow.engine import stats
vllm_metrics.serve_from_this_process()
vllm_metrics.serve_from_this_process()
directory = vllm_metrics.engine_directory()
assert os.stat(directory).st_mode & 0o777 == 0o700
publisher = stats.StatsPublisher(directory, {"model_name": "m", "engine": "0"})
publisher.publish(stats.EngineStats(), "f")
assert generate_latest(REGISTRY).count(b"vllm_workflow:queue_depth{") == 1
print(directory)
"""
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )

    assert not Path(run.stdout.strip()).exists()


def test_with_several_api_servers_the_files_go_where_vllm_collects_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", "/theirs")
    monkeypatch.setenv(vllm_metrics.DIRECTORY_ENV, "/ours")

    vllm_metrics.serve_from_this_process()

    assert vllm_metrics.engine_directory() == "/theirs"
    assert os.environ[vllm_metrics.DIRECTORY_ENV] == "/ours"
