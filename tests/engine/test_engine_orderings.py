"""Orders that need to know a run's past, in vLLM's scheduler, from the wire to the queue."""

import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.engine.engine_builders import add, build_request, fill_seats, ids, run_step

Make = Callable[..., Any]


@pytest.mark.parametrize(
    ("ordering", "key"),
    [("plas", "wf_attained_ms"), ("atlas", "wf_attained_path_ms"), ("sjf", "wf_service_ms")],
)
def test_waiting_calls_are_ordered_by_what_the_router_said_of_them(
    make_scheduler: Make, ordering: str, key: str
) -> None:
    scheduler = make_scheduler(policy=f"least-outstanding+{ordering}")
    fill_seats(scheduler)
    now = time.time()
    sizes = {"much": 30_000, "little": 1_000, "some": 8_000}

    calls = [build_request(n, arrival_time=now, **{key: ms}) for n, ms in sizes.items()]
    add(scheduler, *calls)

    assert ids(scheduler.waiting) == ["little", "some", "much"]


def test_program_order_goes_by_the_age_of_the_run(make_scheduler: Make) -> None:
    scheduler = make_scheduler(policy="least-outstanding+program-fcfs")
    fill_seats(scheduler)

    add(
        scheduler,
        build_request("young", wf_id="y", wf_age_ms=1_000),
        build_request("unknown", wf_id="u", wf_age_ms="junk"),
        build_request("old", wf_id="o", wf_age_ms=90_000),
    )

    assert ids(scheduler.waiting) == ["old", "young", "unknown"]


def test_a_new_run_goes_before_one_that_has_had_service_but_not_for_ever(
    make_scheduler: Make,
) -> None:
    scheduler = make_scheduler(policy="least-outstanding+plas")
    fill_seats(scheduler)
    now = time.time()
    add(scheduler, build_request("served", arrival_time=now, wf_attained_ms=2_000))
    add(scheduler, build_request("soon-after", arrival_time=now + 1.9, wf_id="new"))
    add(scheduler, build_request("long-after", arrival_time=now + 2.1, wf_id="newer"))

    assert ids(scheduler.waiting) == ["soon-after", "served", "long-after"]


@pytest.mark.parametrize("ordering", ["plas", "program-fcfs", "sjf", "deadline"])
def test_what_others_do_takes_no_seats(make_scheduler: Make, ordering: str) -> None:
    scheduler = make_scheduler(policy=f"least-outstanding+{ordering}")
    seated = fill_seats(scheduler)
    add(scheduler, build_request("urgent", wf_budget_ms=1_000))

    run_step(scheduler)

    assert set(ids(scheduler.running)) == set(ids(seated))
