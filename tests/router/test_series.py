"""What every call is counted by says what `prometheus_client` would say."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from vllm_workflow.router.series import Distributions, SeriesCollector, Values

NAMES = st.sampled_from(["a", "b", 'a "quoted"\nname\\'])


def told(*series: Any) -> list[str]:
    registry = CollectorRegistry()
    registry.register(SeriesCollector(series))
    return lines(registry)


def lines(registry: CollectorRegistry) -> list[str]:
    """The exposition, but for when a series was made."""
    text = generate_latest(registry).decode()
    return [
        x.split(" ")[0] if "_created{" in x or "_created " in x else x for x in text.split("\n")
    ]


@given(st.lists(st.tuples(NAMES, NAMES, st.integers(0, 5))))
def test_a_counter_reads_as_the_librarys_own(changes: list[tuple[str, str, int]]) -> None:
    registry = CollectorRegistry()
    theirs = Counter("x:calls", "Calls.", ("instance", "stage"), registry=registry)
    ours = Values("counter", "x:calls", "Calls.", ("instance", "stage"))
    for instance, stage, number in changes:
        theirs.labels(instance, stage).inc(number)
        ours.add((instance, stage), number)

    assert told(ours) == lines(registry)


@given(st.lists(st.tuples(NAMES, st.sampled_from([1, -1]))), NAMES)
def test_a_gauge_reads_as_the_librarys_own_without_what_was_forgotten(
    changes: list[tuple[str, int]], gone: str
) -> None:
    registry = CollectorRegistry()
    theirs = Gauge("x:in_flight", "In flight.", ("instance",), registry=registry)
    ours = Values("gauge", "x:in_flight", "In flight.", ("instance",))
    for instance, number in changes:
        theirs.labels(instance).inc(number)
        ours.add((instance,), number)
    theirs.remove_by_labels({"instance": gone})
    ours.forget("instance", gone)

    assert told(ours) == lines(registry)


@pytest.mark.parametrize("bounds", [(0.5, 1.0, 20.0), (-1.0, 0.0, 1.0)])
@pytest.mark.parametrize("label", ["", "instance"])
@given(
    changes=st.lists(
        st.tuples(NAMES, st.sampled_from([-1.0, 0.5, 1.0, 20.0]) | st.floats(-9, 99))
        | st.just(("a", math.nan))
        | st.just(("b", math.inf))
    ),
    gone=NAMES,
)
def test_a_histogram_reads_as_the_librarys_own(
    bounds: tuple[float, ...], label: str, changes: list[tuple[str, float]], gone: str
) -> None:
    registry = CollectorRegistry()
    labels = [label] if label else []
    theirs = Histogram("x:s", "Seconds.", labels, registry=registry, buckets=bounds)
    ours = Distributions("x:s", "Seconds.", bounds, label)
    for name, value in changes:
        (theirs.labels(name) if label else theirs).observe(value)
        ours.of(name if label else "").observe(value)
    if label:
        theirs.remove_by_labels({label: gone})
        ours.forget(gone)

    assert told(ours) == lines(registry)
