"""Counters, gauges and histograms that every call touches, in the form of `prometheus_client`.

Its own take a lock and half a dozen calls for each change. These are dictionaries and lists of one
event loop, and become samples, the same ones under the same names, when somebody asks.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence

from prometheus_client import Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString as _unchecked

Labels = tuple[str, ...]
_INF = float("inf")
_written: Callable[[float], str] = _unchecked


class Values:
    """A counter or a gauge: a number for each value of its labels.

    Args:
        kind: `counter` or `gauge`.
        name: With its prefix, without `_total`.
        text: What it tells.
        labels: Names of its labels.
    """

    def __init__(self, kind: str, name: str, text: str, labels: Labels) -> None:
        self._kind = kind
        self._name = name
        self._text = text
        self._labels = labels
        self._values: dict[Labels, int] = {}
        self._created: dict[Labels, float] = {}

    def add(self, labels: Labels, number: int) -> None:
        values = self._values
        if labels in values:
            values[labels] += number
        else:
            values[labels] = number
            self._created[labels] = time.time()

    def forget(self, label: str, value: str) -> None:
        """Drop what has a value of a label."""
        index = self._labels.index(label)
        for labels in [labels for labels in self._values if labels[index] == value]:
            del self._values[labels], self._created[labels]

    def metric(self) -> Metric:
        metric = Metric(self._name, self._text, self._kind)
        suffix = "_total" if self._kind == "counter" else ""
        for labels, value in self._values.items():
            named = dict(zip(self._labels, labels))
            metric.add_sample(self._name + suffix, named, float(value))
            if self._kind == "counter":
                metric.add_sample(f"{self._name}_created", named, self._created[labels])
        return metric


class Distribution:
    """How often values fell into each bucket, for one value of the labels of a histogram."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = [*bounds, _INF]
        self._counts = [0] * len(self._bounds)
        self._sum = 0.0
        self._created = time.time()

    def observe(self, value: float) -> None:
        self._sum += value
        if value == value:  # else it is in no bucket
            self._counts[bisect_left(self._bounds, value)] += 1

    def add_to(self, metric: Metric, labels: dict[str, str]) -> None:
        num_until = 0
        for bound, count in zip(self._bounds, self._counts):
            num_until += count
            named = {**labels, "le": _written(bound)}
            metric.add_sample(f"{metric.name}_bucket", named, float(num_until))
        metric.add_sample(f"{metric.name}_count", labels, float(num_until))
        if self._bounds[0] >= 0.0:  # else the sum might fall, which a counter must not
            metric.add_sample(f"{metric.name}_sum", labels, self._sum)
        metric.add_sample(f"{metric.name}_created", labels, self._created)


class Distributions:
    """A histogram: a distribution for each value of its label, or one if it has none.

    Args:
        name: With its prefix.
        text: What it tells.
        bounds: Of its buckets, from below; one without an end is added.
        label: Name of its label; empty for none.
    """

    def __init__(self, name: str, text: str, bounds: Sequence[float], label: str = "") -> None:
        self._name = name
        self._text = text
        self._bounds = bounds
        self._label = label
        self._of: dict[str, Distribution] = {}
        if not label:
            self.of("")

    def of(self, value: str) -> Distribution:
        """Return the distribution for a value of the label."""
        found = self._of.get(value)
        if found is None:
            found = self._of[value] = Distribution(self._bounds)
        return found

    def forget(self, value: str) -> None:
        self._of.pop(value, None)

    def metric(self) -> Metric:
        metric = Metric(self._name, self._text, "histogram")
        for value, distribution in self._of.items():
            distribution.add_to(metric, {self._label: value} if self._label else {})
        return metric


class SeriesCollector(Collector):
    """Shows such series in a registry."""

    def __init__(self, series: Sequence[Values | Distributions]) -> None:
        self._series = series

    def collect(self) -> Iterator[Metric]:
        for each in self._series:
            yield each.metric()
