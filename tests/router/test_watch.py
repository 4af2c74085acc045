"""When an instance counts as hung or stuck: by its silence, against what was predicted."""

from __future__ import annotations

import math

import pytest

from vllm_workflow.core.expectation import (
    answer_at_most_s,
    first_byte_s,
    hopeless_after_s,
    next_byte_s,
    overdue_after_s,
)
from vllm_workflow.core.fleet import Fleet, Instance
from vllm_workflow.core.latency import LatencyModel
from vllm_workflow.core.types import Candidate, Decision, StageRequest
from vllm_workflow.router.attempt import Attempt
from vllm_workflow.router.usage import Usage
from vllm_workflow.router.watch import TICK_S, Silence, WatchClock

STEP_S = 0.05
LATENCY = LatencyModel(overhead_s=0.0, weights_s=STEP_S, per_token_s=0.0)


class Watched:
    """One instance, its silence, and a clock that only the test turns."""

    def __init__(self) -> None:
        self.clock = WatchClock()
        self.silence = Silence(self.clock)
        self.fleet = Fleet()
        self.fleet.add(Instance(instance_id="a", models=(), latency=LATENCY))

    def sleep(self, seconds: float) -> None:
        self.clock.now += seconds

    def attempt(
        self,
        *,
        stream: bool = True,
        prefill_s: float = STEP_S,
        decode_s: float = 1.0,
        max_output_tokens: int | None = None,
    ) -> Attempt:
        chosen = Candidate("a", 0.0, prefill_s, decode_s)
        request = StageRequest(
            request_id="r",
            arrival_time=0.0,
            expected_output_tokens=21.0,
            max_output_tokens=max_output_tokens,
        )
        decision = Decision(request_id="r", chosen=chosen, cost=0.0, candidates=(chosen,))
        attempt = Attempt(decision, request, 0.0, Usage(stream=stream), stream)
        self.silence.begin(attempt)
        return attempt

    def gives(self, attempt: Attempt, num_pieces: int, every_s: float) -> None:
        for _ in range(num_pieces):
            self.sleep(every_s)
            self.silence.heard(attempt)

    def hung_after_s(self) -> float:
        """Send probes that nobody answers until it is condemned; returns how long that took."""
        spent_s = 0.0
        while not self.is_hung:
            if self.wants_probe:
                self.silence.probe_sent()
            self.sleep(TICK_S)
            spent_s += TICK_S
        return spent_s

    @property
    def wants_probe(self) -> bool:
        return self.silence.wants_probe(self.fleet)

    @property
    def is_hung(self) -> bool:
        return self.silence.is_hung(self.fleet)

    @property
    def is_stuck(self) -> bool:
        return self.silence.is_stuck(self.fleet)


def test_a_stopped_instance_is_condemned_within_two_seconds_even_if_nothing_is_overdue() -> None:
    watched = Watched()
    watched.attempt(stream=False, decode_s=60.0)

    assert watched.hung_after_s() <= 2.0


def test_a_stream_that_is_overdue_has_its_instance_condemned_sooner() -> None:
    watched = Watched()
    stream = watched.attempt()
    watched.gives(stream, 10, STEP_S)

    assert watched.hung_after_s() <= overdue_after_s(STEP_S) + 0.5 + 3 * TICK_S


def test_streams_are_given_up_two_seconds_after_the_probe_and_not_before() -> None:
    watched = Watched()
    watched.gives(watched.attempt(), 10, STEP_S)
    watched.silence.probe_sent()
    watched.sleep(1.9)
    assert watched.is_hung
    assert not watched.silence.is_lost
    watched.sleep(0.2)
    assert watched.silence.is_lost


def test_a_port_that_is_closed_is_silence_of_the_calls_behind_it() -> None:
    watched = Watched()
    stream = watched.attempt()
    watched.gives(stream, 10, STEP_S)
    spent_s = 0.0
    while not watched.silence.is_lost:
        if spent_s % 0.5 < TICK_S:  # as an instance that is out is probed
            watched.silence.probe_sent()
            watched.silence.probe_failed()
        watched.sleep(TICK_S)
        spent_s += TICK_S
        assert spent_s < 2.5
    assert watched.is_hung

    # Behind a closed port calls may be brought to their end.
    watched.silence.heard(stream)
    assert not watched.is_hung
    assert not watched.silence.is_lost
    watched.sleep(60.0)
    watched.silence.probe_sent()
    watched.silence.probe_ended(answered=True)
    assert not watched.is_hung


def test_an_instance_that_answers_probes_is_not_hung_however_slow_it_is() -> None:
    watched = Watched()
    slow = watched.attempt(max_output_tokens=30)
    for _ in range(60):
        watched.gives(slow, 1, 10.0 * STEP_S)
        watched.silence.probe_sent()
        watched.sleep(0.01)
        watched.silence.probe_ended(answered=True)

        assert not watched.is_hung
        assert not watched.is_stuck


def test_a_probe_without_an_answer_met_silence_only_if_nothing_else_was_heard() -> None:
    watched = Watched()
    stream = watched.attempt()
    watched.silence.probe_sent()
    watched.gives(stream, 10, STEP_S)
    assert not watched.silence.probe_ended(answered=False)

    watched.sleep(STEP_S)
    watched.silence.probe_sent()
    watched.sleep(5.0)
    assert watched.silence.probe_ended(answered=False)
    watched.silence.probe_sent()
    assert not watched.silence.probe_ended(answered=True)


def test_bytes_of_one_call_speak_for_all() -> None:
    watched = Watched()
    watched.attempt(stream=False)
    other = watched.attempt()
    watched.silence.probe_sent()
    watched.gives(other, 100, 0.1)

    assert not watched.is_hung
    assert not watched.wants_probe


def test_a_server_whose_probes_are_slow_gets_the_time_that_it_needs() -> None:
    watched = Watched()
    for _ in range(3):
        watched.silence.probe_sent()
        watched.sleep(0.4)
        watched.silence.probe_ended(answered=True)
    watched.attempt(stream=False)
    watched.silence.probe_sent()
    watched.sleep(1.4)
    assert not watched.is_hung
    watched.sleep(0.3)
    assert watched.is_hung


def test_what_the_router_sleeps_through_is_nobody_s_silence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = WatchClock()
    clock._last -= 3600.0
    clock.tick()

    assert clock.now <= 2 * TICK_S


def test_a_slow_client_is_not_its_instance_s_silence() -> None:
    watched = Watched()
    stream = watched.attempt(max_output_tokens=10)
    watched.gives(stream, 100, STEP_S)
    stream.is_reading = False
    watched.sleep(600.0)
    assert not watched.is_stuck
    stream.is_reading = True
    watched.silence.resume(stream)
    assert not watched.is_stuck


def test_an_engine_that_gives_nothing_is_stuck_even_if_its_server_is_well() -> None:
    watched = Watched()
    stream = watched.attempt()
    watched.gives(stream, 100, STEP_S)
    watched.sleep(hopeless_after_s(STEP_S) - TICK_S)
    assert not watched.is_stuck
    watched.sleep(2 * TICK_S)
    assert watched.is_stuck


def test_a_server_that_sends_large_pieces_is_not_stuck_between_two_of_them() -> None:
    watched = Watched()
    stream = watched.attempt()
    watched.gives(stream, 60, 30.0)
    watched.sleep(200.0)

    assert not watched.is_stuck


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_of_unbounded_length_has_no_hour_at_which_its_engine_is_stuck(
    stream: bool,
) -> None:
    watched = Watched()
    watched.attempt(stream=stream)
    watched.sleep(3600.0)

    assert not watched.is_stuck


def test_one_of_bounded_length_is_given_the_time_of_its_longest_answer() -> None:
    watched = Watched()
    attempt = watched.attempt(stream=False, max_output_tokens=2_000)
    longest_s = answer_at_most_s(attempt.request, attempt.decision.chosen)

    assert longest_s == pytest.approx(STEP_S + 2_000 / 20.0)
    watched.sleep(hopeless_after_s(longest_s) - 1.0)
    assert not watched.is_stuck
    watched.sleep(2.0)
    assert watched.is_stuck


def test_what_is_ahead_of_a_call_is_the_prefill_of_those_that_have_no_byte_yet() -> None:
    watched = Watched()
    first, second = (watched.attempt(prefill_s=2.0) for _ in range(2))
    assert (first.first_byte_s, second.first_byte_s) == (2.0, 4.0)
    watched.gives(first, 3, STEP_S)
    assert watched.attempt(prefill_s=1.0).first_byte_s == 3.0
    for attempt in (first, second):
        watched.silence.end(attempt)

    assert watched.attempt(prefill_s=1.0).first_byte_s == 2.0


def test_a_long_prefill_ahead_makes_a_later_first_byte() -> None:
    chosen = Candidate("a", 1.0, 2.0, 4.0)

    assert first_byte_s(chosen, stream=True, ahead_s=10.0) == 13.0
    assert first_byte_s(chosen, stream=False) == 7.0


def test_between_two_pieces_a_whole_prefill_may_run_at_the_speed_learned() -> None:
    latency = LatencyModel(
        overhead_s=0.0, weights_s=0.01, per_token_s=0.001, max_num_batched_tokens=1000
    )
    fleet = Fleet()
    fleet.add(Instance(instance_id="a", models=(), latency=latency))
    request = StageRequest(request_id="r", arrival_time=0.0)
    usual_s = next_byte_s(fleet, "a", request)
    for _ in range(50):
        fleet.observe("a", predicted_s=1.0, actual_s=4.0)

    assert usual_s == pytest.approx(latency.step_s(num_prefill_tokens=999, num_decode_seqs=1))
    assert next_byte_s(fleet, "a", request) == pytest.approx(fleet.drift("a") * usual_s)
    assert fleet.drift("a") > 2.0
    assert math.isfinite(overdue_after_s(usual_s))
