import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_workflow.emulation.timeline import LATENESS_BUCKETS_S, Timeline


def test_a_step_launched_in_time_begins_when_the_one_before_ends() -> None:
    timeline = Timeline(time_scale=1.0)

    first = timeline.launch(0.5, 100.0, continues=False)
    second = timeline.launch(0.25, 100.25, continues=True)

    assert (first, second) == (100.5, 100.75)
    assert (timeline.num_steps, timeline.busy_s, timeline.stalled_s) == (2, 0.75, 0.0)


def test_a_late_launch_stalls_the_gpu_if_requests_were_waiting_for_it() -> None:
    timeline = Timeline(time_scale=1.0)
    timeline.launch(0.5, 100.0, continues=False)

    end = timeline.launch(0.5, 101.0, continues=True)

    assert end == 101.5
    assert timeline.stalled_s == 0.5


def test_without_anything_to_run_no_time_is_lost() -> None:
    timeline = Timeline(time_scale=1.0)
    timeline.launch(0.5, 100.0, continues=False)

    timeline.launch(0.5, 200.0, continues=False)

    assert timeline.stalled_s == 0.0


def test_a_time_scale_of_two_is_twice_as_fast() -> None:
    assert Timeline(time_scale=2.0).launch(1.0, 10.0, continues=False) == 10.5
    assert Timeline(time_scale=0.5).launch(1.0, 10.0, continues=False) == 12.0


def test_lateness_is_counted_by_bucket_and_never_below_zero() -> None:
    timeline = Timeline(time_scale=1.0)
    for now in (9.5, 10.0, 10.015625, 20.0):
        timeline.handed_over(10.0, now)

    assert timeline.late_s == 10.015625
    counts = dict(zip(LATENESS_BUCKETS_S, timeline.late_counts))
    assert (counts[0.0001], counts[0.02], counts[math.inf]) == (2, 1, 1)
    assert sum(timeline.late_counts) == 4


@given(
    steps=st.lists(
        st.tuples(st.floats(0.001, 1.0), st.floats(0.0, 2.0), st.booleans()), min_size=1
    ),
    time_scale=st.sampled_from([0.5, 1.0, 4.0]),
)
def test_time_is_either_in_a_step_or_between_two(
    steps: list[tuple[float, float, bool]], time_scale: float
) -> None:
    timeline = Timeline(time_scale=time_scale)
    now, end, idle_s = 0.0, 0.0, 0.0
    for i, (step_s, later_s, continues) in enumerate(steps):
        now += later_s
        idle_s += max(0.0, now - end)
        begin = max(now, end)
        end = timeline.launch(step_s, now, continues=continues and i > 0)
        assert end - begin == pytest.approx(step_s / time_scale)

    assert timeline.busy_s + idle_s == pytest.approx(end)
    assert timeline.stalled_s <= idle_s + 1e-9
