"""The calls of one run as they turn out, and how long each of its paths went on.

No client declares a graph. A call is taken to follow the call of its run that ended last before
it was made: that is so wherever a client reacts to answers. Of calls side by side, the last one
to end is then followed by what waited for all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from vllm_workflow.core.types import StageRequest

MAX_CALLS_OF_RUN = 256
"""Calls of a run that are kept; of later ones only the time counts."""
MAX_STAGES_OF_RUN = 64
_NO_ROUNDS: Mapping[str, int] = {}


class MadeCall(NamedTuple):
    """A call when it is made."""

    stage: str
    after: int
    """Index of the ended call that it follows; −1: the beginning of the run."""
    num_before: int
    """Calls of its stage on the path to it."""
    gap_s: float
    """From the end of the call before to its own arrival: the client's own work."""


class EndedCall(NamedTuple):
    """A call that ended well."""

    made: MadeCall
    alone_s: float
    """Its service, had it been alone on its instance."""
    was_last: bool
    """Nothing of the run was in flight when it had ended: calls that began side by side met."""


class RunPath:
    """What one run has shown so far."""

    __slots__ = ("_rounds", "end_time", "ended", "in_flight", "start_time", "tail_s")

    def __init__(self, start_time: float) -> None:
        self.start_time = start_time
        self.end_time = start_time
        """Of the call that ended last."""
        self.in_flight: dict[str, MadeCall] = {}
        """By request id."""
        self.ended: list[EndedCall] = []
        self.tail_s = 0.0
        """What the run went on after the calls that are kept."""
        self._rounds: list[Mapping[str, int]] = []
        """Per ended call: calls of each stage on the path to it, itself included."""

    def num_before(self, stage: str) -> int:
        """Calls of a stage on the path that a call made now would continue."""
        return self._rounds[-1].get(stage, 0) if self._rounds else 0

    def began(self, request: StageRequest) -> None:
        """Note that a call has been made."""
        self.in_flight[request.request_id] = MadeCall(
            request.stage,
            len(self.ended) - 1,
            self.num_before(request.stage),
            max(0.0, request.arrival_time - self.end_time) if self.ended else 0.0,
        )

    def failed(self, request_id: str) -> None:
        """Note that a call has ended otherwise than well."""
        self.in_flight.pop(request_id, None)

    def finished(self, request_id: str, *, end_time: float, alone_s: float) -> None:
        """Note that a call has ended well."""
        made = self.in_flight.pop(request_id, None)
        if made is None:
            return
        if len(self.ended) < MAX_CALLS_OF_RUN:
            self.ended.append(EndedCall(made, alone_s, not self.in_flight))
            before = self._rounds[made.after] if made.after >= 0 else _NO_ROUNDS
            rounds = dict(before)
            if made.stage in rounds or len(rounds) < MAX_STAGES_OF_RUN:
                rounds[made.stage] = made.num_before + 1
            self._rounds.append(rounds)
        else:  # of a call that ran beside the last one, what it took longer
            self.tail_s += min(made.gap_s + alone_s, max(0.0, end_time - self.end_time))
        self.end_time = max(self.end_time, end_time)

    def rests_s(self) -> list[float]:
        """Return the longest path of calls and gaps after each ended call, shape (n,).

        A call that nothing follows, while others of the run are in flight, waits for them: what
        follows the last of them follows it too. Nobody waits here, and no load is counted: it
        is what the run would take, alone.
        """
        rests_s = [-1.0] * len(self.ended)
        met = len(self.ended) - 1
        for index in range(met, -1, -1):
            call = self.ended[index]
            if index == len(self.ended) - 1:
                rests_s[index] = max(rests_s[index], self.tail_s)
            elif call.was_last:
                met = index
            if rests_s[index] < 0.0:
                rests_s[index] = rests_s[met] if index != met else 0.0
            after = call.made.after
            if after >= 0:
                path_s = call.made.gap_s + call.alone_s + rests_s[index]
                rests_s[after] = max(rests_s[after], path_s)
        return rests_s
