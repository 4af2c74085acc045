"""How a number is distributed: a few hundred bytes, always up to date, no value kept.

Buckets grow by a constant factor, so a quantile is off by less than half a bucket whatever its
size, as in DDSketch (Masson, Rim and Lee, VLDB 2019, arXiv 1908.10693). What was seen long ago
fades by forward decay (Cormode, Shkapenyuk, Srivastava and Xu, ICDE 2009): instead of making
all older values lighter, each new one is heavier than the one before.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

BUCKETS_PER_OCTAVE: Final = 4
"""A bucket's bounds are 19 % apart, so its middle is at most 9 % off."""
LEAST, MOST = 1e-3, 1e9
"""Smaller values count as 0, larger ones as `MOST`: tokens and seconds are in between."""
MEMORY: Final = 200.0
"""Values that the newest of many count for together."""
_GROWTH: Final = MEMORY / (MEMORY - 1.0)
_MAX_INCREMENT: Final = 1e12
_NUM_NEW: Final = 64
"""Values that may wait to be sorted in."""
_ZERO: Final = -(1 << 20)
"""The bucket of what is below `LEAST`."""


class Histogram:
    """A distribution of values from 0, the latest `MEMORY` of them or so.

    The mean is exact, quantiles are those of buckets. Of the first values none fades, so it is
    worth something from the first one on.
    """

    __slots__ = ("_increment", "_new", "_num_folded", "_sum", "_total", "_weights")

    def __init__(self) -> None:
        self._num_folded = 0
        self._new: list[float] = []
        self._weights: dict[int, float] = {}
        self._increment = 1.0
        self._total = 0.0
        self._sum = 0.0

    def add(self, value: float) -> None:
        """Count one value; below 0 counts as 0."""
        self._new.append(value)
        if len(self._new) >= _NUM_NEW:
            self._fold()

    @property
    def num_values(self) -> int:
        """Values that were added, faded or not."""
        return self._num_folded + len(self._new)

    def _fold(self) -> None:
        """Sort new values into their buckets: many at once cost a third of one by one."""
        weights, increment, total, weighted = self._weights, self._increment, self._total, self._sum
        for value in self._new:
            if value >= LEAST:
                value = min(value, MOST)
                bucket = math.floor(BUCKETS_PER_OCTAVE * math.log2(value))
                weighted += increment * value
            else:
                bucket = _ZERO
            weights[bucket] = weights.get(bucket, 0.0) + increment
            total += increment
            increment *= _GROWTH
        self._num_folded += len(self._new)
        self._new.clear()
        self._increment, self._total, self._sum = increment, total, weighted
        if increment > _MAX_INCREMENT:
            self._shrink()

    def _shrink(self) -> None:
        """Take the newest weight as 1 again; what has all but faded goes."""
        scale = 1.0 / self._increment
        self._weights = {b: w * scale for b, w in self._weights.items() if w * scale > 1e-9}
        self._total = math.fsum(self._weights.values())
        self._sum *= scale
        self._increment = 1.0

    @property
    def weight(self) -> float:
        """What all values count for, in units of the newest one: at most `MEMORY`."""
        self._fold()
        return self._total * _GROWTH / self._increment

    @property
    def mean(self) -> float | None:
        """None of nothing."""
        self._fold()
        return self._sum / self._total if self._total else None

    def quantile(self, share: float) -> float | None:
        """Return a value that `share` of all lie below, within 9 %; None of nothing.

        Args:
            share: From 0 to 1. Between the bounds of a bucket values are taken to be evenly
                spread in the logarithm.
        """
        self._fold()
        left = share * self._total
        value = None
        for bucket in sorted(self._weights):
            weight = self._weights[bucket]
            value = 0.0 if bucket == _ZERO else _value(bucket + min(max(left / weight, 0.0), 1.0))
            if left <= weight:
                break
            left -= weight
        return value

    def to_mapping(self) -> dict[str, Any]:
        """Return what `from_mapping` takes: plain values, the newest weighing 1."""
        self._fold()
        scale = 1.0 / self._increment
        return {
            "num_values": self.num_values,
            "sum": self._sum * scale,
            "weights": [[b, self._weights[b] * scale] for b in sorted(self._weights)],
        }

    @classmethod
    def from_mapping(cls, data: Mapping[str, Any]) -> Histogram:
        """Return a histogram as it was written down.

        Raises:
            KeyError, TypeError, ValueError: `data` is not such a mapping.
        """
        made = cls()
        made._num_folded = int(data["num_values"])
        made._sum = _finite(data["sum"])
        rows: Sequence[Sequence[Any]] = data["weights"]
        made._weights = {int(bucket): _finite(weight) for bucket, weight in rows}
        made._total = math.fsum(made._weights.values())
        return made


def _value(position: float) -> float:
    """What lies at a position on the logarithmic scale, in buckets."""
    return math.exp2(position / BUCKETS_PER_OCTAVE)


def _finite(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"expected a number, got {value!r}")
    if not 0.0 <= value < math.inf:
        raise ValueError(f"expected a number from 0, got {value!r}")
    return float(value)
