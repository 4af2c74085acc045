"""One instance in the ledger: what is in flight on it, and what one more call would cost there."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, NamedTuple

from vllm_workflow.core.latency import LatencyModel
from vllm_workflow.core.prefix import KvLedger
from vllm_workflow.core.types import Candidate, StageRequest

_MIN_DRIFT_WEIGHT = 0.05
"""Share of one call in the drift factor: about the last twenty calls decide."""
_PRIOR_DRIFT_WEIGHT = 4.0
"""Calls that the configured latency counts for until then."""
_MAX_DRIFT = 8.0
_OVERDUE_SHARE = 0.25
"""A call that has outlived its prediction is taken to need this share of its age still."""
_OTHERS_S = 2.0
"""Other people's calls are taken to need this long still; about the time between two reports."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """One vLLM server as configured."""

    instance_id: str
    models: tuple[str, ...]
    """Model names it serves; empty means that it serves any."""
    latency: LatencyModel = field(default_factory=LatencyModel)
    max_num_seqs: int = 256
    """Calls that run side by side; further ones wait, in the router with late binding."""
    num_kv_tokens: int | None = None
    """Tokens that its KV cache holds; None where that is not known."""

    def serves(self, model: str) -> bool:
        return not self.models or not model or model in self.models


class Reserved(NamedTuple):
    """A call in flight, as it was predicted when it was sent."""

    service_s: float
    start_time: float
    end_time: float
    num_tokens: float
    """Of the KV cache, that nobody else needed then."""
    max_stretch: float
    """By which its instance may be slower than for one call alone without making it late."""


class Need:
    """What one call asks of any instance, worked out once for all of them."""

    __slots__ = (
        "context",
        "model",
        "num_at_most",
        "num_decoded",
        "num_own_tokens",
        "prefills",
        "request",
    )

    def __init__(self, request: StageRequest, num_at_most: float) -> None:
        expected = request.expected_output_tokens
        self.request = request
        self.num_at_most = num_at_most
        """Tokens that an instance must be able to hold."""
        self.num_own_tokens = num_own_tokens(request)
        self.num_decoded = expected - 1.0 if expected > 1.0 else 0.0
        self.context = request.num_prompt_tokens + 0.5 * expected
        """Of one sequence like this one, mean while it decodes."""
        self.prefills: dict[tuple[int, int], float] = {}
        """Seconds by latency model, which instances of one kind share, and cached tokens."""


class Account:
    """What is known of one instance beside its configuration."""

    __slots__ = (
        "drift",
        "healthy",
        "hit_share",
        "instance",
        "kv",
        "num_observed",
        "num_others",
        "outstanding_s",
        "reserved",
    )

    def __init__(self, instance: Instance) -> None:
        self.instance = instance
        self.kv = KvLedger(_capacity(instance))
        self.healthy = True
        self.reserved: dict[str, Reserved] = {}
        self.outstanding_s = 0.0
        self.num_others = 0
        """Calls there that this ledger has not sent, as far as the instance tells."""
        self.drift = 1.0
        """Actual over predicted service, smoothed."""
        self.num_observed = 0
        self.hit_share = 1.0
        """Of the prompt tokens that should be in its prefix cache, those that were."""

    def replace(self, instance: Instance) -> None:
        """Go on with other properties."""
        self.instance = instance
        self.kv.resize(_capacity(instance))

    def observe(self, predicted_s: float, actual_s: float) -> None:
        """Correct its speed by one finished call; see `Fleet.observe`."""
        ratio = actual_s / predicted_s if predicted_s > 0.0 else 1.0
        if math.isfinite(ratio) and ratio > 0.0:
            self.num_observed += 1
            weight = max(_MIN_DRIFT_WEIGHT, 1.0 / (_PRIOR_DRIFT_WEIGHT + self.num_observed))
            step = weight * math.log(min(max(ratio, 1 / _MAX_DRIFT), _MAX_DRIFT))
            drift = self.drift * math.exp(step)
            self.drift = min(max(drift, 1 / _MAX_DRIFT), _MAX_DRIFT)

    def observe_cached(self, predicted: int, actual: int) -> None:
        """Learn how far it caches what it is believed to; see `Fleet.observe_cached`."""
        if predicted > 0:
            share = min(max(actual / predicted, 0.0), 1.0)
            self.hit_share += _MIN_DRIFT_WEIGHT * (share - self.hit_share)

    def speed(self) -> dict[str, Any]:
        """Return what was learned, as plain values that `restore_speed` takes."""
        return {
            "latency": latency_fingerprint(self.instance.latency),
            "drift": self.drift,
            "num_observed": self.num_observed,
            "hit_share": self.hit_share,
        }

    def restore_speed(
        self, latency: str, drift: float, num_observed: int, hit_share: float
    ) -> bool:
        """Begin with what was learned earlier; see `Fleet.restore_speed`.

        Raises:
            ValueError: A number that cannot be.
        """
        if not (1 / _MAX_DRIFT <= drift <= _MAX_DRIFT and 0.0 <= hit_share <= 1.0):
            raise ValueError(f"drift, hit_share: got {drift!r}, {hit_share!r}")
        if latency_fingerprint(self.instance.latency) != latency:
            return False
        self.drift, self.hit_share = drift, hit_share
        self.num_observed = max(0, num_observed)
        return True

    @property
    def num_ahead(self) -> int:
        """Calls there, whoever sent them."""
        return len(self.reserved) + self.num_others

    @property
    def is_idle(self) -> bool:
        """Whether no call of this ledger is there, and others leave a seat and some KV cache.

        Such an instance takes any call: none will end here and make more room, and for the end
        of others' calls the engine can wait itself.
        """
        return not self.reserved and (
            not self.num_others
            or (self.num_others < self.instance.max_num_seqs and self.kv.num_free_tokens > 0.0)
        )

    @property
    def has_room(self) -> bool:
        """Whether it can start a further call, if it is a small one; an idle one takes any."""
        return self.healthy and (
            self.is_idle
            or (self.num_ahead < self.instance.max_num_seqs and self.kv.num_free_tokens > 0.0)
        )

    def is_eligible(self, need: Need, exclude: Collection[str]) -> bool:
        """Whether it may get a call, now or later."""
        return (
            self.healthy
            and need.num_at_most <= self.kv.num_tokens
            and self.instance.serves(need.request.model)
            and self.instance.instance_id not in exclude
        )

    def can_start(self, need: Need) -> bool:
        """Whether it has a seat and KV blocks for a call now, if it has room at all."""
        if self.is_idle:
            return True
        free = self.kv.num_free_tokens
        return (
            need.num_own_tokens <= free
            and self.kv.num_new_tokens(need.request.prefix, need.num_own_tokens) <= free
        )

    def alone_s(self, need: Need) -> float:
        """Service of a call here if nothing else ran."""
        prefill_s, _, _ = self._prefill(need)
        step_s = self.instance.latency.decode_step_s(1, need.context)
        return self.drift * (prefill_s + need.num_decoded * step_s)

    def predict(self, need: Need, now: float) -> Candidate:
        """Say what a call would cost here."""
        instance, kv, drift = self.instance, self.kv, self.drift
        latency, num_ahead = instance.latency, self.num_ahead
        prefill_s, num_cached, num_new = self._prefill(need)
        queue_s, num_beside = 0.0, num_ahead
        if (num_ahead >= instance.max_num_seqs or num_new > kv.num_free_tokens) and (
            not self.is_idle
        ):
            queue_s, num_beside = self._room_s(num_new, now)
        num_decoded, context = need.num_decoded, need.context
        step_s = latency.decode_step_s(num_beside + 1, context)
        together_s = num_decoded * step_s
        slowdown_s, stretch = 0.0, 1.0
        if num_beside:
            slowdown_s = together_s - num_decoded * latency.decode_step_s(num_beside, context)
            stretch = step_s / latency.decode_step_s(1, context)
        return Candidate(
            instance.instance_id,
            queue_s,
            drift * prefill_s,
            drift * together_s,
            drift * num_beside * (prefill_s + slowdown_s),
            num_ahead,
            self.outstanding_s,
            num_cached,
            stretch,
        )

    def _prefill(self, need: Need) -> tuple[float, int, float]:
        """Seconds of its prefill here, tokens that need none, KV tokens that it would take."""
        latency = self.instance.latency
        num_prompt_tokens = need.request.num_prompt_tokens
        num_cached, num_new = 0, need.num_own_tokens
        if need.request.prefix:
            num_held, num_new = self.kv.probe(need.request.prefix, num_new)
            num_cached = int(self.hit_share * min(num_held, num_prompt_tokens - 1))
        key = (id(latency), num_cached)
        prefill_s = need.prefills.get(key)
        if prefill_s is None:
            prefill_s = need.prefills[key] = latency.prefill_s(
                num_prompt_tokens - num_cached, num_cached_tokens=num_cached
            )
        return prefill_s, num_cached, num_new

    def own_wait_s(self, need: Need, now: float) -> float:
        """Seconds until calls of this ledger end and leave room; `inf` if only others' can."""
        _, _, num_new = self._prefill(need)
        return self._room_s(num_new, now, others_s=math.inf)[0]

    def _room_s(
        self, num_new_tokens: float, now: float, *, others_s: float = _OTHERS_S
    ) -> tuple[float, int]:
        """Seconds until a call finds a seat and KV room, and how many calls then run beside it.

        Calls are taken to end when it was predicted that they would, those that are overdue
        after a while that grows with their delay, and those sent last to wait for the first
        ones too.
        """
        seats = self.instance.max_num_seqs
        free = self.kv.num_free_tokens
        left, left_own = self.num_ahead, len(self.reserved)
        until = now
        ends = [
            (end if end > now else now + _OVERDUE_SHARE * (now - start), num_tokens, 1, 1)
            for _, start, end, num_tokens, _ in self.reserved.values()
        ]
        if self.num_others:
            # Nobody knows when they end; the next report may say that they have.
            ends.append((now + others_s, self.kv.num_other_tokens, self.num_others, 0))
        ends.sort()
        for end_time, num_tokens, num_calls, num_own in ends:
            if left < seats and (num_new_tokens <= free or (not left_own and free > 0.0)):
                break
            until = end_time
            free += num_tokens
            left -= num_calls
            left_own -= num_own
        return until - now, left


def num_own_tokens(request: StageRequest) -> float:
    """KV tokens that no other call shares: the rest of its prompt, and its answer."""
    num_head_tokens = 0
    for segment in request.prefix:
        num_head_tokens += segment.num_tokens
    num_rest = request.num_prompt_tokens - num_head_tokens
    return (num_rest if num_rest > 0 else 0) + request.expected_output_tokens


def max_stretch(request: StageRequest, candidate: Candidate, now: float) -> float:
    """How much slower than alone a call's run may go from `now` on, and still be on time.

    `inf` without a deadline, and for a run that cannot be on time anyway: nobody has to make
    room for it.
    """
    needed_s = candidate.alone_s + request.rest_s
    left_s = request.deadline - now
    return left_s / needed_s if 0.0 < needed_s <= left_s else math.inf


def _capacity(instance: Instance) -> float:
    return math.inf if instance.num_kv_tokens is None else instance.num_kv_tokens


def latency_fingerprint(latency: LatencyModel) -> str:
    """Return what tells one latency model from another."""
    return sha256(repr(latency).encode()).hexdigest()[:12]
