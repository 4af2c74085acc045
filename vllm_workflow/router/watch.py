"""Notices instances that fall silent while calls wait for them.

A probe is a call too, with a duration that is known from the ones before. An instance counts
as hung when a probe of it is overdue, or found nobody, and not a byte of anything has come from it
since that probe was sent; sooner when the calls themselves are overdue by the latency model. A
slow instance answers probes and stays. One that answers probes, but of whose calls none has
advanced for far longer than predicted, has a stuck engine.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable

from vllm_workflow.core.expectation import (
    answer_at_most_s,
    first_byte_s,
    hopeless_after_s,
    next_byte_s,
    overdue_after_s,
)
from vllm_workflow.core.fleet import Fleet
from vllm_workflow.router.attempt import Attempt

TICK_S = 0.05
MAX_SILENCE_S = 0.4
"""With calls under way; then it is probed, whatever was predicted of them."""
PROBE_PATIENCE_S = 1.0
OVERDUE_PROBE_PATIENCE_S = 0.5
"""When a call is overdue as well."""
STREAM_PATIENCE_S = 2.0
"""Until streams that have begun are given up too: nobody can take them over, and an instance that
only paused goes on with them."""
_PROBE_FACTOR = 4.0
"""Times the slowest of the latest probes, if that is more than the patience above."""
_MAX_PROBE_PATIENCE_S = 5.0
_FORGET_PROBES = 0.9
"""Share of the slowest probe that is remembered after each further one."""
_GAP_FACTOR = 10.0
"""Times the longest of the latest gaps in streams, after which an engine may be stuck."""
_FORGET_GAPS = 0.995
_NUM_GAPS = 50
"""Until so many were seen, a server may send an answer in any number of pieces."""


class WatchClock:
    """Seconds during which this process ran: what it slept through is nobody's silence."""

    def __init__(self) -> None:
        self.now = 0.0
        self._last = time.monotonic()

    def tick(self) -> None:
        last, self._last = self._last, time.monotonic()
        self.now += min(self._last - last, 2.0 * TICK_S)


class Silence:
    """What one instance has said lately, and who waits for it."""

    def __init__(self, clock: WatchClock) -> None:
        self.attempts: set[Attempt] = set()
        self._clock = clock
        self._heard_at = clock.now
        self._call_heard_at = clock.now
        self._probe_sent_at: float | None = None
        self._unanswered_at: float | None = None
        """When the first probe was sent of those since the last answer to one."""
        self._ahead_s = 0.0
        """Prefill of calls without a first byte."""
        self._slowest_probe_s = 0.0
        self._longest_gap_s = 0.0
        self._num_gaps = 0

    def begin(self, attempt: Attempt) -> None:
        """Note that a call is being sent, `end` must follow; predicts its first byte."""
        if not self.attempts:
            # An instance with nothing to do has nothing to say.
            self._heard_at = self._call_heard_at = self._clock.now
            self._ahead_s = 0.0
        chosen = attempt.decision.chosen
        attempt.first_byte_s = first_byte_s(chosen, stream=attempt.stream, ahead_s=self._ahead_s)
        attempt.heard_at = self._clock.now
        self._ahead_s += chosen.prefill_s
        self.attempts.add(attempt)

    def heard(self, attempt: Attempt) -> None:
        """Note bytes of an answer."""
        if not attempt.has_first_byte:
            attempt.first_byte_time = time.monotonic()
            self._ahead_s -= attempt.decision.chosen.prefill_s
        elif attempt.stream:
            self._num_gaps += 1
            gap_s = self._clock.now - attempt.heard_at
            self._longest_gap_s = max(gap_s, _FORGET_GAPS * self._longest_gap_s)
        attempt.heard_at = self._heard_at = self._call_heard_at = self._clock.now

    def resume(self, attempt: Attempt) -> None:
        """Note that bytes are asked for again, after a client that took its time."""
        attempt.heard_at = self._clock.now

    def end(self, attempt: Attempt) -> None:
        self.attempts.discard(attempt)
        if not attempt.has_first_byte:
            self._ahead_s -= attempt.decision.chosen.prefill_s

    def probe_sent(self) -> None:
        self._probe_sent_at = self._clock.now
        if self._unanswered_at is None:
            self._unanswered_at = self._clock.now

    def probe_failed(self) -> None:
        """Note that a probe found nobody to answer it.

        That is silence, too: a server that is told to stop closes its port at once, and may keep
        the connections of its calls for minutes after its engine has gone.
        """
        self._probe_sent_at = None

    def probe_ended(self, *, answered: bool) -> bool:
        """Note the end of a probe; returns whether it met nothing but silence."""
        sent_at, self._probe_sent_at = self._probe_sent_at, None
        self._unanswered_at = None
        if answered and sent_at is not None:
            self._heard_at = self._clock.now
            took_s = self._clock.now - sent_at
            self._slowest_probe_s = max(took_s, _FORGET_PROBES * self._slowest_probe_s)
        return not answered and sent_at is not None and self._heard_at <= sent_at

    def abandon(self, *, begun: bool) -> None:
        """End the waits for answers that this instance will not give.

        Args:
            begun: Also of which clients have a part already.
        """
        for attempt in list(self.attempts):
            if begun or not attempt.is_begun:
                attempt.abandon()

    @property
    def is_probed(self) -> bool:
        return self._probe_sent_at is not None

    def wants_probe(self, fleet: Fleet) -> bool:
        """Whether it is time to look whether it lives."""
        if not self.attempts or self.is_probed:
            return False
        silent_s = self._clock.now - self._heard_at
        return silent_s > MAX_SILENCE_S or (silent_s > TICK_S and self._is_overdue(fleet))

    def is_hung(self, fleet: Fleet) -> bool:
        """Whether a probe is overdue, and nothing else was heard since it was sent."""
        silent_s, learned_s = self._probe_silence_s()
        if silent_s <= max(OVERDUE_PROBE_PATIENCE_S, learned_s):
            return False
        return silent_s > max(PROBE_PATIENCE_S, learned_s) or self._is_overdue(fleet)

    @property
    def is_lost(self) -> bool:
        """Whether that lasts so long that streams are given up, too."""
        silent_s, learned_s = self._probe_silence_s()
        return silent_s > max(STREAM_PATIENCE_S, learned_s)

    def _probe_silence_s(self) -> tuple[float, float]:
        """Seconds that a probe has met nothing but silence, and that it may, by those before."""
        if self._unanswered_at is None:
            return 0.0, 0.0
        silent_s = self._clock.now - max(self._unanswered_at, self._heard_at)
        return silent_s, min(_PROBE_FACTOR * self._slowest_probe_s, _MAX_PROBE_PATIENCE_S)

    def is_stuck(self, fleet: Fleet) -> bool:
        """Whether none of its calls has advanced for far longer than predicted."""
        silent_s = self._clock.now - self._call_heard_at
        return silent_s > hopeless_after_s(0.0) and any(
            attempt.is_reading
            and min(silent_s, self._clock.now - attempt.heard_at)
            > self._hopeless_after_s(attempt, fleet)
            for attempt in self.attempts
        )

    def _is_overdue(self, fleet: Fleet) -> bool:
        return any(
            attempt.is_reading
            and self._clock.now - attempt.heard_at > overdue_after_s(_expected_s(attempt, fleet))
            for attempt in self.attempts
        )

    def _hopeless_after_s(self, attempt: Attempt, fleet: Fleet) -> float:
        if attempt.stream and attempt.has_first_byte and self._num_gaps >= _NUM_GAPS:
            limit_s = hopeless_after_s(_expected_s(attempt, fleet))
            return max(limit_s, _GAP_FACTOR * self._longest_gap_s)
        return hopeless_after_s(answer_at_most_s(attempt.request, attempt.decision.chosen))


def _expected_s(attempt: Attempt, fleet: Fleet) -> float:
    if attempt.stream and attempt.has_first_byte:
        return next_byte_s(fleet, attempt.instance_id, attempt.request)
    return attempt.first_byte_s


async def watch(
    clock: WatchClock,
    silences: Callable[[], Iterable[tuple[str, Silence]]],
    fleet: Fleet,
    *,
    probe: Callable[[str], None],
    condemn: Callable[[str, str], None],
) -> None:
    """Look at all instances again and again until cancelled.

    Args:
        clock: That of the silences; only this advances it.
        silences: Those of all instances, with their ids.
        fleet: For predictions.
        probe: Has an instance probed now.
        condemn: Takes an instance out; is given `hung` or `stuck`.
    """
    while True:
        await asyncio.sleep(TICK_S)
        clock.tick()
        for instance_id, silence in silences():
            if silence.is_hung(fleet):
                condemn(instance_id, "hung")
            elif silence.is_stuck(fleet):
                condemn(instance_id, "stuck")
            elif silence.wants_probe(fleet):
                probe(instance_id)
