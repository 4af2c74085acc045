"""The calls of one run as they turn out, and how long each of its paths went on.

No client declares a graph. A call is taken to follow the call of its run that ended last before
it was made: that is so wherever a client reacts to answers. Of calls side by side, the last one
to end is then followed by what waited for all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

MAX_CALLS_OF_RUN: Final = 256
"""Calls of a run that are kept; of later ones only the time counts."""
MAX_STAGES_OF_RUN: Final = 64
_NO_ROUNDS: Mapping[str, int] = {}


class PathCall:
    """A call of a run."""

    __slots__ = ("after", "alone_s", "gap_s", "num_before", "rounds", "stage", "was_last")

    def __init__(self, stage: str, after: int, rounds: Mapping[str, int], gap_s: float) -> None:
        self.stage = stage
        self.after = after
        """Index of the ended call that it follows; −1: the beginning of the run."""
        self.rounds = rounds
        """Calls of each stage on the path to it, while it is in flight."""
        self.num_before = rounds.get(stage, 0)
        """Calls of its stage on the path to it."""
        self.gap_s = gap_s
        """From the end of the call before to its own arrival: the client's own work."""
        self.alone_s = 0.0
        """Its service, had it been alone on its instance."""
        self.was_last = False
        """Nothing of the run was in flight when it had ended: calls side by side met."""


class RunPath:
    """What one run has shown so far."""

    __slots__ = ("_rounds", "end_time", "ended", "in_flight", "is_final", "tail_s")

    def __init__(self, start_time: float) -> None:
        self.end_time = start_time
        """Of the call that ended last."""
        self.in_flight: dict[str, PathCall] = {}
        """By request id."""
        self.ended: list[PathCall] = []
        """Those that ended well, in that order."""
        self.tail_s = 0.0
        """What the run went on after the calls that are kept."""
        self.is_final = False
        """Its client has said that it is over; calls made beside the last one may be in flight."""
        self._rounds = _NO_ROUNDS
        """Calls of each stage on the path to the one that ended last, itself included. Of those
        before it nobody needs to know: that would be most of what is kept of a run."""

    def num_before(self, stage: str) -> int:
        """Calls of a stage on the path that a call made now would continue."""
        return self._rounds.get(stage, 0)

    def began(self, request_id: str, stage: str, arrival_time: float) -> None:
        """Note that a call has been made."""
        ended = self.ended
        if ended:
            gap_s = arrival_time - self.end_time
            gap_s = gap_s if gap_s > 0.0 else 0.0
            call = PathCall(stage, len(ended) - 1, self._rounds, gap_s)
        else:
            call = PathCall(stage, -1, _NO_ROUNDS, 0.0)
        self.in_flight[request_id] = call

    def failed(self, request_id: str) -> None:
        """Note that a call has ended otherwise than well."""
        self._pop(request_id)

    def _pop(self, request_id: str) -> PathCall | None:
        call = self.in_flight.pop(request_id, None)
        if not self.in_flight:
            self.in_flight.clear()  # which gives back its table
        return call

    def finished(self, request_id: str, *, end_time: float, alone_s: float) -> None:
        """Note that a call has ended well."""
        call = self._pop(request_id)
        if call is None:
            return
        if len(self.ended) < MAX_CALLS_OF_RUN:
            call.alone_s = alone_s
            call.was_last = not self.in_flight
            self._rounds = call.rounds
            if call.num_before or len(call.rounds) < MAX_STAGES_OF_RUN:
                self._rounds = {**call.rounds, call.stage: call.num_before + 1}
            call.rounds = _NO_ROUNDS
            self.ended.append(call)
        else:  # of a call that ran beside the last one, what it took longer
            self.tail_s += min(call.gap_s + alone_s, max(0.0, end_time - self.end_time))
        if end_time > self.end_time:
            self.end_time = end_time

    def rests_s(self) -> list[float]:
        """Return the longest path of calls and gaps after each ended call, shape (n,).

        A call that nothing follows, while others of the run are in flight, waits for them: what
        follows the last of them follows it too. Nobody waits here, and no load is counted: it
        is what the run would take, alone.
        """
        ended = self.ended
        last = met = len(ended) - 1
        rests_s = [-1.0] * len(ended)
        if ended:
            rests_s[last] = self.tail_s
        for index in range(last, -1, -1):
            call, rest_s = ended[index], rests_s[index]
            if call.was_last:
                met = index
            if rest_s < 0.0:  # nothing follows it: it waits for those beside it
                rest_s = rests_s[index] = rests_s[met] if met != index else 0.0
            path_s = call.gap_s + call.alone_s + rest_s
            after = call.after
            if after >= 0 and path_s > rests_s[after]:
                rests_s[after] = path_s
        return rests_s
