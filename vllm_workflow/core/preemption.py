"""Whether taking the seat or the KV blocks of a running call pays, in seconds.

What it saves is waiting: until the next call ends, and room comes of itself. What it costs is
computing again what the victim loses. Both are measured on the engine at hand, from its own
steps. The engine plug-in and the simulated engines ask the same object.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from typing import Final

MIN_GAIN: Final = 2.0
"""Seconds of waiting that a preemption must save per second of computing again that it causes.
Not 1: the work is certain, the saving is an estimate, and whoever runs beside it waits too."""
NUM_DEPARTURES: Final = 9
"""Latest ends of calls that the time to the next one is taken from."""
DECAY: Final = 0.98
"""Weight of the past per step with prompt tokens; the last fifty count most."""
MAX_RUNS: Final = 4096
"""Runs whose losses are remembered; the one that lost least recently is forgotten first."""


class PreemptionCosts:
    """What one engine has measured, and what its runs have lost so far.

    Args:
        max_waste_s: Seconds of computing again that one run is made to do at most, over all its
            calls.
    """

    __slots__ = ("_departures", "_max_waste_s", "_num_prefill_tokens", "_prefill_s", "_waste_s")

    def __init__(self, max_waste_s: float) -> None:
        self._max_waste_s = max_waste_s
        self._departures: deque[float] = deque(maxlen=NUM_DEPARTURES)
        self._prefill_s = 0.0
        self._num_prefill_tokens = 0.0
        self._waste_s: OrderedDict[str, float] = OrderedDict()

    def note_prefill(self, duration_s: float, num_tokens: int) -> None:
        """Learn from a step that computed prompt tokens.

        Args:
            duration_s: Of the whole step: decoding beside it is waited for too.
            num_tokens: Tokens of the step beyond one per call.
        """
        if num_tokens > 0 and 0.0 < duration_s < math.inf:
            self._prefill_s = DECAY * self._prefill_s + duration_s
            self._num_prefill_tokens = DECAY * self._num_prefill_tokens + num_tokens

    def note_departure(self, now: float) -> None:
        """Learn that a call has ended and left its seat and blocks."""
        self._departures.append(now)

    def recompute_s(self, num_tokens: int) -> float:
        """Seconds to compute so many tokens again; 0 while nothing was measured."""
        if self._num_prefill_tokens <= 0.0:
            return 0.0
        return num_tokens * self._prefill_s / self._num_prefill_tokens

    def wait_s(self, now: float) -> float:
        """Seconds between two ends of calls of late; `inf` while fewer than two have ended.

        The time since the last end counts too: many calls may end in one step and then none
        for long.

        Args:
            now: On the clock of `note_departure`.
        """
        ends = self._departures
        if len(ends) < 2:
            return math.inf
        return max(0.0, ends[-1] - ends[0], now - ends[0]) / (len(ends) - 1)

    def pays(self, cost_s: float, now: float) -> bool:
        """Whether not waiting for the next call to end is worth that much computing again."""
        return MIN_GAIN * cost_s <= self.wait_s(now)

    def may_lose(self, run_id: str, cost_s: float) -> bool:
        """Whether a run stays within what it may be made to compute again."""
        return self._waste_s.get(run_id, 0.0) + cost_s <= self._max_waste_s

    def charge(self, run_id: str, cost_s: float) -> None:
        """Count a loss against a run."""
        self._waste_s[run_id] = self._waste_s.pop(run_id, 0.0) + cost_s
        if len(self._waste_s) > MAX_RUNS:
            self._waste_s.popitem(last=False)
