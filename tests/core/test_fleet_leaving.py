"""Instances that leave while calls run on them."""

from __future__ import annotations

import pytest

from tests.builders import dispatcher, instance, outcome, stage_request
from vllm_workflow.core.errors import NoInstanceError


def test_an_instance_that_was_removed_gets_no_more_calls() -> None:
    brain = dispatcher(instance("a"), instance("b"))
    brain.remove("a")

    decision = brain.submit(stage_request("r"), now=0.0)

    assert decision is not None
    assert decision.chosen.instance_id == "b"
    assert [i.instance_id for i in brain.fleet] == ["b"]


def test_calls_in_flight_on_it_stay_counted_until_they_end() -> None:
    brain = dispatcher(instance("a"))
    brain.submit(stage_request("r"), now=0.0)
    brain.remove("a")
    assert brain.fleet.num_outstanding("a") == 1
    assert "a" not in brain.fleet

    brain.settle(outcome("r", "a"))

    assert brain.fleet.num_outstanding() == 0
    with pytest.raises(KeyError):
        brain.fleet.instance("a")


def test_a_probe_that_comes_late_does_not_bring_it_back() -> None:
    brain = dispatcher(instance("a"))
    brain.submit(stage_request("r"), now=0.0)
    brain.remove("a")

    brain.mark("a", healthy=True)

    with pytest.raises(NoInstanceError):
        brain.submit(stage_request("s"), now=0.0)


def test_it_comes_back_with_the_calls_that_still_run_there() -> None:
    brain = dispatcher(instance("a"))
    brain.submit(stage_request("r"), now=0.0)
    brain.remove("a")
    brain.add(instance("a"))
    brain.mark("a", healthy=True)

    decision = brain.submit(stage_request("s"), now=0.0)

    assert decision is not None
    assert brain.fleet.num_outstanding("a") == 2
