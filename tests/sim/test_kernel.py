from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_workflow.sim.kernel import Kernel


@given(st.lists(st.tuples(st.floats(0, 10), st.integers(0, 2))))
def test_events_happen_by_time_then_priority_then_as_announced(
    announced: list[tuple[float, int]],
) -> None:
    kernel, seen = Kernel(), []
    for index, (time, priority) in enumerate(announced):
        kernel.at(time, seen.append, (time, priority, index), priority)

    kernel.run()

    assert seen == sorted(
        (time, priority, index) for index, (time, priority) in enumerate(announced)
    )


def test_event_announced_by_another_at_the_same_instant_still_happens() -> None:
    kernel, seen = Kernel(), []
    kernel.at(1.0, lambda _: kernel.at(kernel.now, seen.append, "second"), None)

    kernel.run()

    assert seen == ["second"]
    assert kernel.now == 1.0


def test_run_stops_after_what_happens_at_until() -> None:
    kernel, seen = Kernel(), []
    for time in (1.0, 2.0, 3.0):
        kernel.at(time, seen.append, time)

    kernel.run(until=2.0)

    assert seen == [1.0, 2.0]


@pytest.mark.parametrize("time", [0.5, math.nan])
def test_past_is_closed(time: float) -> None:
    kernel = Kernel()
    kernel.at(1.0, lambda _: kernel.at(time, print, None), None)

    with pytest.raises(ValueError, match="expected at least now"):
        kernel.run()
