"""Shapes that lengths, counts and gaps are drawn from."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate

from vllm_workflow.core.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class LogNormal:
    """A log-normal by its own mean and standard deviation, cut to `low` and `high`."""

    mean: float
    sd: float
    low: float = 0.0
    high: float = math.inf

    def __post_init__(self) -> None:
        if not (0 < self.mean < math.inf and 0 <= self.sd < math.inf and self.low <= self.high):
            raise ConfigError(f"log-normal: expected mean > 0, sd >= 0, low <= high, got {self}")

    def draw(self, rng: random.Random) -> float:
        """Return one value; mass beyond the ends gathers at them, as at a token limit."""
        variance = math.log1p((self.sd / self.mean) ** 2)
        value = rng.lognormvariate(math.log(self.mean) - 0.5 * variance, math.sqrt(variance))
        return min(max(value, self.low), self.high)

    def draw_tokens(self, rng: random.Random) -> int:
        """Return one value as a number of tokens, at least 1."""
        return max(1, round(self.draw(rng)))


def choose(weights: Mapping[int, float], rng: random.Random) -> int:
    """Return one of the numbers, each by its weight; takes one draw."""
    return rng.choices(list(weights), weights=list(weights.values()))[0]


def zipf(num_items: int, exponent: float, rng: random.Random) -> int:
    """Return a rank from 0, rank k with weight (k + 1) ** -exponent; takes one draw.

    Args:
        num_items: At least 1.
        exponent: 0 is uniform; 1 is the classic law of popularity.
        rng: The stream.
    """
    cumulated = list(accumulate((k + 1) ** -exponent for k in range(num_items)))
    return rng.choices(range(num_items), cum_weights=cumulated)[0]
