"""The series of an emulated GPU on the server's `/metrics`; `lateness.py` reads them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from vllm_workflow.emulation.timeline import LATENESS_BUCKETS_S, Timeline
from vllm_workflow.vllm_metrics import Sample

HELP_TEXTS = {
    "emulated_steps": "Steps of the emulated GPU.",
    "emulated_busy_seconds": "Time that the emulated GPU spent in steps, as planned.",
    "emulated_stalled_seconds": (
        "Time between steps of the emulated GPU while requests that had been running waited for "
        "their next one: the CPU was late."
    ),
    "emulated_late_seconds": (
        "Sum over steps: from the planned end until the scheduler had the output."
    ),
    "emulated_step_lateness_seconds": "Steps by how late their output was against the plan.",
    "emulated_gpu_info": "What is emulated; always 1. No model runs here.",
}


def samples(timeline: Timeline, info: Mapping[str, str]) -> Iterator[Sample]:
    """Every value; `info` are the labels of `emulated_gpu_info`."""
    yield "gauge", "emulated_gpu_info", info, 1
    yield "counter", "emulated_steps", {}, timeline.num_steps
    yield "counter", "emulated_busy_seconds", {}, timeline.busy_s
    yield "counter", "emulated_stalled_seconds", {}, timeline.stalled_s
    yield "counter", "emulated_late_seconds", {}, timeline.late_s
    for bound, count in zip(LATENESS_BUCKETS_S, timeline.late_counts, strict=True):
        yield "histogram", "emulated_step_lateness_seconds", {"le": repr(bound)}, count
