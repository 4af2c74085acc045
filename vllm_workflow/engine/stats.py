"""What the workflow scheduler reports on the server's own `/metrics`.

The scheduler lives in the engine-core process, `/metrics` in the API process. Between them lie
files in the format of prometheus_client's multiprocess mode: a few doubles in shared memory,
written at most a few times per second. Where `PROMETHEUS_MULTIPROC_DIR` is set (by the user, or
by vLLM for several API servers) the files go there and vLLM's own `/metrics` adds them up.
Otherwise `serve_from_this_process` makes a private directory, which its children inherit by an
environment variable, and registers a collector that reads it on each scrape.

A `vllm.stat_logger_plugins` class would not do: to have one installed switches vLLM's statistics
on even under `--disable-log-stats`, and it hears of engine steps only, not of what a step decided.
"""

from __future__ import annotations

import atexit
import bisect
import os
import shutil
import struct
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from prometheus_client import REGISTRY
from prometheus_client.mmap_dict import MmapedDict, mmap_key
from prometheus_client.multiprocess import MultiProcessCollector

DIRECTORY_ENV = "_VLLM_WORKFLOW_METRICS_DIR"
MULTIPROC_ENV = "PROMETHEUS_MULTIPROC_DIR"
PUBLISH_INTERVAL_S = 0.25
"""Least time between two publications while requests are there."""
SLACK_BUCKETS_S = (-60.0, -30.0, -10.0, -5.0, -2.0, 0.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)

_PREFIX = "vllm_workflow:"
_HELP = {
    "queue_depth": "Requests that wait for this engine to run them.",
    "slack_at_admission_seconds": (
        "Seconds to spare when a request with a deadline first got a seat: "
        "deadline - now - predicted duration - rest of the run."
    ),
    "deadline_met": "Requests that ended well by the deadline of their run.",
    "deadline_missed": "Requests that ended, in whatever way, after the deadline of their run.",
    "preemptions": "Running requests preempted for an urgent waiting one, by what it lacked.",
    "capped_prefills": "Prefill chunks made smaller because urgent requests were present.",
    "unreadable_metadata": "wf_* values of requests that made no sense and were ignored.",
    "failures": "Steps in which vLLM's own order was used because of an error in this plug-in.",
    "policy_info": "Fingerprint of the policy in use; always 1.",
}


class EngineStats:
    """What one scheduler counted since it started."""

    def __init__(self) -> None:
        self.queue_depth = 0
        self.deadline_met = 0
        self.deadline_missed = 0
        self.preemptions = {"seat": 0, "kv": 0}
        self.capped_prefills = 0
        self.unreadable_metadata = 0
        self.failures = 0
        self.slack_counts = [0] * (len(SLACK_BUCKETS_S) + 1)
        """Requests admitted per bucket of slack, not cumulative; the last one is unbounded."""

    def observe_slack(self, slack_s: float) -> None:
        self.slack_counts[bisect.bisect_left(SLACK_BUCKETS_S, slack_s)] += 1


class StatsPublisher:
    """Writes an engine's statistics to where the API process finds them."""

    def __init__(self, directory: str | os.PathLike[str], labels: Mapping[str, str]) -> None:
        """Create this engine's files.

        Args:
            directory: One that `prometheus_client.multiprocess` reads.
            labels: `model_name` and `engine`, as on vLLM's own series.
        """
        # The infix keeps clear of files that prometheus_client itself may open in this process.
        process = f"workflow-{os.getpid()}-{labels.get('engine', '0')}"
        kinds = {"counter": "counter", "gauge": "gauge_mostrecent", "histogram": "histogram"}
        self._paths = {k: Path(directory, f"{name}_{process}.db") for k, name in kinds.items()}
        self._files = {
            kind: MmapedDict(str(path))  # type: ignore[no-untyped-call]
            for kind, path in self._paths.items()
        }
        self._labels = dict(labels)
        self._keys: dict[tuple[str, ...], str] = {}
        self._written: dict[str, float] = {}
        self._next_time = 0.0

    def publish_sometimes(self, stats: EngineStats, fingerprint: str) -> None:
        """Publish, unless that was done a moment ago."""
        now = time.monotonic()
        if now >= self._next_time:
            self._next_time = now + PUBLISH_INTERVAL_S
            self.publish(stats, fingerprint)

    def publish(self, stats: EngineStats, fingerprint: str) -> None:
        """Make the current values visible; costs what changed since the last time."""
        for kind, name, labels, value in _samples(stats, fingerprint):
            key = self._key(kind, name, labels)
            if self._written.get(key) != value:
                # prometheus_client ignores a `mostrecent` gauge without a time.
                timestamp = time.time() if kind == "gauge" else 0.0
                file = self._files[kind]
                file.write_value(key, float(value), timestamp)  # type: ignore[no-untyped-call]
                self._written[key] = value

    def close(self) -> None:
        """Withdraw this engine's series."""
        for file in self._files.values():
            file.close()  # type: ignore[no-untyped-call]
        for path in self._paths.values():
            path.unlink(missing_ok=True)
        self._files.clear()

    def _key(self, kind: str, name: str, labels: Mapping[str, str]) -> str:
        suffix = {"counter": "_total", "gauge": "", "histogram": "_bucket"}[kind]
        cached = self._keys.get((name, *labels.values()))
        if cached is None:
            everything = {**self._labels, **labels}
            cached = mmap_key(
                _PREFIX + name,
                _PREFIX + name + suffix,
                list(everything),
                list(everything.values()),
                _HELP[name],
            )
            self._keys[name, *labels.values()] = cached
        return cached


def _samples(
    stats: EngineStats, fingerprint: str
) -> Iterator[tuple[str, str, Mapping[str, str], float]]:
    """Every value as (kind, name, labels, value). The sum of a signed histogram means nothing."""
    yield "gauge", "queue_depth", {}, stats.queue_depth
    yield "gauge", "policy_info", {"fingerprint": fingerprint}, 1
    yield "counter", "deadline_met", {}, stats.deadline_met
    yield "counter", "deadline_missed", {}, stats.deadline_missed
    yield "counter", "capped_prefills", {}, stats.capped_prefills
    yield "counter", "unreadable_metadata", {}, stats.unreadable_metadata
    yield "counter", "failures", {}, stats.failures
    for cause, count in stats.preemptions.items():
        yield "counter", "preemptions", {"cause": cause}, count
    for bound, count in zip((*SLACK_BUCKETS_S, float("inf")), stats.slack_counts, strict=True):
        yield "histogram", "slack_at_admission_seconds", {"le": repr(bound)}, count


def engine_directory() -> str | None:
    """Where an engine of this process publishes; None if nobody would read it."""
    return os.environ.get(MULTIPROC_ENV) or os.environ.get(DIRECTORY_ENV)


def serve_from_this_process() -> None:
    """Have the default registry of this process serve what its child engines publish."""
    if os.environ.get(MULTIPROC_ENV):
        return
    directory = tempfile.mkdtemp(prefix="vllm-workflow-")
    os.environ[DIRECTORY_ENV] = directory
    atexit.register(_remove, directory, os.getpid())
    REGISTRY.register(_Collector(directory))


def _remove(directory: str, owner_pid: int) -> None:
    if os.getpid() == owner_pid:  # a forked child runs this too
        shutil.rmtree(directory, ignore_errors=True)


class _Collector:
    """The engines' files as metrics; nothing while they cannot be read."""

    def __init__(self, directory: str) -> None:
        self._files = MultiProcessCollector(None, directory)  # type: ignore[no-untyped-call]

    def collect(self) -> Iterable[Any]:
        try:
            return list(self._files.collect())  # type: ignore[no-untyped-call]
        except (OSError, ValueError, RuntimeError, struct.error):
            return []  # an engine is just creating or withdrawing its files
