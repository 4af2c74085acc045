"""What happens in vLLM's engine-core process, as series on the server's own `/metrics`.

The API process serves `/metrics`. Between the two processes lie files in the format of
prometheus_client's multiprocess mode: a few doubles in shared memory, written at most a few times
per second. Where `PROMETHEUS_MULTIPROC_DIR` is set (by the user, or by vLLM for several API
servers) the files go there and vLLM's own `/metrics` adds them up. Otherwise
`serve_from_this_process` makes a private directory, which its children inherit by an environment
variable, and registers a collector that reads it on each scrape.

A `vllm.stat_logger_plugins` class would not do: to have one installed switches vLLM's statistics
on even under `--disable-log-stats`, and it hears of engine steps only, not of what a step decided.
"""

from __future__ import annotations

import atexit
import os
import shutil
import struct
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from prometheus_client import REGISTRY
from prometheus_client.mmap_dict import MmapedDict, mmap_key
from prometheus_client.multiprocess import MultiProcessCollector

DIRECTORY_ENV = "_VLLM_WORKFLOW_METRICS_DIR"
MULTIPROC_ENV = "PROMETHEUS_MULTIPROC_DIR"
PUBLISH_INTERVAL_S = 0.25
"""Least time between two publications while requests are there."""

_PREFIX = "vllm_workflow:"

Sample: TypeAlias = tuple[str, str, Mapping[str, str], float]
"""Kind (`counter`, `gauge` or `histogram`), name without prefix and suffix, labels, value.

A histogram is given by its buckets: label `le`, values not cumulative."""


class SeriesFiles:
    """The series of one part of an engine, where the API process finds them."""

    def __init__(
        self,
        directory: str | os.PathLike[str],
        labels: Mapping[str, str],
        *,
        part: str,
        help_texts: Mapping[str, str],
    ) -> None:
        """Create the files.

        Args:
            directory: One that `prometheus_client.multiprocess` reads.
            labels: `model_name` and `engine`, as on vLLM's own series.
            part: Keeps apart the files of several parts of one process.
            help_texts: Name of a series -> what it counts.
        """
        # The infix keeps clear of files that prometheus_client itself may open in this process.
        process = f"{part}-{os.getpid()}-{labels.get('engine', '0')}"
        kinds = {"counter": "counter", "gauge": "gauge_mostrecent", "histogram": "histogram"}
        self._paths = {k: Path(directory, f"{name}_{process}.db") for k, name in kinds.items()}
        self._files = {
            kind: MmapedDict(str(path))  # type: ignore[no-untyped-call]
            for kind, path in self._paths.items()
        }
        self._labels = dict(labels)
        self._help_texts = help_texts
        self._keys: dict[tuple[str, ...], str] = {}
        self._written: dict[str, float] = {}
        self._next_time = 0.0

    def is_due(self) -> bool:
        """Whether the last time that this was true is long enough ago to write again."""
        now = time.monotonic()
        if now < self._next_time:
            return False
        self._next_time = now + PUBLISH_INTERVAL_S
        return True

    def write(self, samples: Iterable[Sample]) -> None:
        """Make the current values visible; costs what changed since the last time."""
        for kind, name, labels, value in samples:
            key = self._key(kind, name, labels)
            if self._written.get(key) != value:
                # prometheus_client ignores a `mostrecent` gauge without a time.
                timestamp = time.time() if kind == "gauge" else 0.0
                file = self._files[kind]
                file.write_value(key, float(value), timestamp)  # type: ignore[no-untyped-call]
                self._written[key] = value

    def close(self) -> None:
        """Withdraw the series."""
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
                self._help_texts[name],
            )
            self._keys[name, *labels.values()] = cached
        return cached


def engine_labels(vllm_config: Any) -> dict[str, str]:
    """Labels as vLLM gives its own series of this engine."""
    parallel = vllm_config.parallel_config
    engine = getattr(parallel, "data_parallel_index", parallel.data_parallel_rank)
    return {
        "model_name": str(vllm_config.model_config.served_model_name),
        "engine": str(engine),
    }


def engine_directory() -> str | None:
    """Where an engine of this process publishes; None if nobody would read it."""
    return os.environ.get(MULTIPROC_ENV) or os.environ.get(DIRECTORY_ENV)


def serve_from_this_process() -> None:
    """Have the default registry of this process serve what its child engines publish.

    May be called again, by another part of this package.
    """
    if os.environ.get(MULTIPROC_ENV) or _serves(os.environ.get(DIRECTORY_ENV)):
        return
    directory = tempfile.mkdtemp(prefix="vllm-workflow-")
    os.environ[DIRECTORY_ENV] = directory
    atexit.register(_remove, directory, os.getpid())
    REGISTRY.register(_Collector(directory))


def _serves(directory: str | None) -> bool:
    """Whether this process reads that directory already; a variable may be inherited."""
    return any(
        isinstance(collector, _Collector) and collector.directory == directory
        for collector in list(REGISTRY._collector_to_names)
    )


def _remove(directory: str, owner_pid: int) -> None:
    if os.getpid() == owner_pid:  # a forked child runs this too
        shutil.rmtree(directory, ignore_errors=True)


class _Collector:
    """The engines' files as metrics; nothing while they cannot be read."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self._files = MultiProcessCollector(None, directory)  # type: ignore[no-untyped-call]

    def collect(self) -> Iterable[Any]:
        try:
            return list(self._files.collect())  # type: ignore[no-untyped-call]
        except (OSError, ValueError, RuntimeError, struct.error):
            return []  # an engine is just creating or withdrawing its files
