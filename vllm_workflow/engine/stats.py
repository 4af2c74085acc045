"""What the workflow scheduler reports on the server's own `/metrics`."""

from __future__ import annotations

import bisect
import os
from collections.abc import Iterator, Mapping

from vllm_workflow.vllm_metrics import Sample, SeriesFiles

SLACK_BUCKETS_S = (-60.0, -30.0, -10.0, -5.0, -2.0, 0.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)

HELP_TEXTS = {
    "queue_depth": "Requests that wait for this engine to run them.",
    "slack_at_admission_seconds": (
        "Seconds to spare when a request with a deadline first got a seat: "
        "deadline - now - predicted duration - rest of the run."
    ),
    "deadline_met": "Requests that ended well by the deadline of their run.",
    "deadline_missed": "Requests that ended, in whatever way, after the deadline of their run.",
    "preemptions": "Running requests preempted for an urgent waiting one, by what it lacked.",
    "recomputed_seconds": (
        "Predicted seconds of computing again what those preempted requests lost."
    ),
    "put_off": "Waiting requests that could no longer be on time and went behind those that can.",
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
        self.recomputed_s = 0.0
        self.put_off = 0
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
        """Create this engine's files; see `SeriesFiles`."""
        self._files = SeriesFiles(directory, labels, part="workflow", help_texts=HELP_TEXTS)

    def publish_sometimes(self, stats: EngineStats, fingerprint: str) -> None:
        """Publish, unless that was done a moment ago."""
        if self._files.is_due():
            self.publish(stats, fingerprint)

    def publish(self, stats: EngineStats, fingerprint: str) -> None:
        """Make the current values visible; costs what changed since the last time."""
        self._files.write(_samples(stats, fingerprint))

    def close(self) -> None:
        """Withdraw this engine's series."""
        self._files.close()


def _samples(stats: EngineStats, fingerprint: str) -> Iterator[Sample]:
    """Every value. The sum of a signed histogram means nothing."""
    yield "gauge", "queue_depth", {}, stats.queue_depth
    yield "gauge", "policy_info", {"fingerprint": fingerprint}, 1
    yield "counter", "deadline_met", {}, stats.deadline_met
    yield "counter", "deadline_missed", {}, stats.deadline_missed
    yield "counter", "recomputed_seconds", {}, stats.recomputed_s
    yield "counter", "put_off", {}, stats.put_off
    yield "counter", "capped_prefills", {}, stats.capped_prefills
    yield "counter", "unreadable_metadata", {}, stats.unreadable_metadata
    yield "counter", "failures", {}, stats.failures
    for cause, count in stats.preemptions.items():
        yield "counter", "preemptions", {"cause": cause}, count
    for bound, count in zip((*SLACK_BUCKETS_S, float("inf")), stats.slack_counts, strict=True):
        yield "histogram", "slack_at_admission_seconds", {"le": repr(bound)}, count
