"""A waiting call that starts: what it could start on, and which calls are looked at for it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Final, final

from vllm_workflow.core.backlog import Kind, Waiting
from vllm_workflow.core.types import Candidate

_INF: Final = math.inf
MAX_LOOKED_AT: Final = 16
"""Calls of one kind that turn out not to fit, after which no more of it are looked at when
something has changed. Those for which every instance is full are passed over at no cost."""


@final
class Choice:
    """A call that starts now, and where."""

    __slots__ = (
        "candidates",
        "chosen",
        "costs",
        "waiting",
    )

    waiting: Final[Waiting]
    candidates: Final[tuple[Candidate, ...]]
    costs: Final[Sequence[float]]
    chosen: Final[int]
    """Index of the candidate that it starts on."""

    def __init__(
        self,
        waiting: Waiting,
        candidates: tuple[Candidate, ...],
        costs: Sequence[float],
        chosen: int,
    ) -> None:
        self.waiting = waiting
        self.candidates = candidates
        self.costs = costs
        self.chosen = chosen


def count_in_vain(kind: Kind, num_in_vain: dict[Kind, int], passed_over: set[Kind]) -> None:
    """Note that a call does not fit; where many do not, no more of that kind are looked at."""
    num_calls = num_in_vain[kind] = num_in_vain.get(kind, 0) + 1
    if num_calls >= MAX_LOOKED_AT:
        passed_over.add(kind)


def without(first: Waiting | None, calls: Iterator[Waiting]) -> Iterator[Waiting]:
    for waiting in calls:
        if waiting is not first:
            yield waiting


def able_among(candidates: Sequence[Candidate], claims: Mapping[str, float] | None) -> list[int]:
    """Indexes of the candidates that a call could start on now.

    A call does not wait for a faster instance while a slower one could start it: that pays for
    the call, and leaves the fleet idle when many do it.

    Args:
        candidates: Predictions; those with no `queue_s` can start it.
        claims: Seconds until a call that goes first starts on an instance: what would still be
            there by then is not started there. None: none does.
    """
    able = []
    for index, candidate in enumerate(candidates):
        if candidate.queue_s <= 0.0 and (
            not claims or candidate.finish_s <= claims.get(candidate.instance_id, _INF)
        ):
            able.append(index)
    return able
