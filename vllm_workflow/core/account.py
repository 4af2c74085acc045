"""One instance in the ledger: what is in flight on it, and what one more call would cost there."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, Final, final

from vllm_workflow.core.latency import LatencyModel
from vllm_workflow.core.prefix import KvLedger
from vllm_workflow.core.types import Candidate, StageRequest

_INF: Final = math.inf

_MIN_DRIFT_WEIGHT: Final = 0.05
"""Share of one call in the drift factor: about the last twenty calls decide."""
_PRIOR_DRIFT_WEIGHT: Final = 4.0
"""Calls that the configured latency counts for until then."""
_MAX_DRIFT: Final = 8.0
_MIN_DRIFT: Final = 1 / 8.0
_OVERDUE_SHARE: Final = 0.25
"""A call that has outlived its prediction is taken to need this share of its age still."""
_OTHERS_S: Final = 2.0
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


@final
class Reserved:
    """A call in flight, as it was predicted when it was sent."""

    __slots__ = (
        "end_time",
        "max_stretch",
        "num_tokens",
        "service_s",
        "start_time",
    )

    service_s: Final[float]
    start_time: Final[float]
    end_time: Final[float]
    num_tokens: Final[float]
    """Of the KV cache, that nobody else needed then."""
    max_stretch: Final[float]
    """By which its instance may be slower than for one call alone without making it late."""

    def __init__(
        self,
        service_s: float,
        start_time: float,
        end_time: float,
        num_tokens: float,
        max_stretch: float,
    ) -> None:
        self.service_s = service_s
        self.start_time = start_time
        self.end_time = end_time
        self.num_tokens = num_tokens
        self.max_stretch = max_stretch


@final
class _OnModel:
    """What a call takes on instances of one latency model."""

    __slots__ = ("alone_step_s", "num_cached", "prefill_s")

    def __init__(self, alone_step_s: float) -> None:
        self.alone_step_s = alone_step_s
        """Of one decode step if nothing else runs."""
        self.num_cached = -1
        self.prefill_s = 0.0
        """With so many tokens cached, which were looked at last."""


@final
class Need:
    """What one call asks of any instance, worked out once for all of them."""

    __slots__ = (
        "context",
        "model",
        "num_at_most",
        "num_decoded",
        "num_own_tokens",
        "num_prompt_tokens",
        "on_model",
        "prefix",
        "request",
    )

    def __init__(self, request: StageRequest, num_at_most: float) -> None:
        expected = request.expected_output_tokens
        self.request = request
        self.model = request.model
        self.prefix = request.prefix
        self.num_prompt_tokens = request.num_prompt_tokens
        self.num_at_most = num_at_most
        """Tokens that an instance must be able to hold."""
        self.num_own_tokens = num_own_tokens(request)
        self.num_decoded = expected - 1.0 if expected > 1.0 else 0.0
        self.context = request.num_prompt_tokens + 0.5 * expected
        """Of one sequence like this one, mean while it decodes."""
        self.on_model: dict[int, _OnModel] = {}
        """By the identity of a latency model, which instances of one kind share."""


@final
class Account:
    """What is known of one instance beside its configuration."""

    __slots__ = (
        "drift",
        "healthy",
        "hit_share",
        "instance",
        "kv",
        "latency_id",
        "num_observed",
        "num_others",
        "outstanding_s",
        "reserved",
    )

    def __init__(self, instance: Instance) -> None:
        self.instance = instance
        self.latency_id = id(instance.latency)
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
        self.latency_id = id(instance.latency)
        self.kv.resize(_capacity(instance))

    def observe(self, predicted_s: float, actual_s: float) -> None:
        """Correct its speed by one finished call; see `Fleet.observe`."""
        ratio = actual_s / predicted_s if predicted_s > 0.0 else 1.0
        if 0.0 < ratio < _INF:
            self.num_observed += 1
            weight = 1.0 / (_PRIOR_DRIFT_WEIGHT + self.num_observed)
            if weight < _MIN_DRIFT_WEIGHT:
                weight = _MIN_DRIFT_WEIGHT
            step = weight * math.log(_as_drift(ratio))
            self.drift = _as_drift(self.drift * math.exp(step))

    def observe_cached(self, predicted: int, actual: int) -> None:
        """Learn how far it caches what it is believed to; see `Fleet.observe_cached`."""
        if predicted > 0:
            share = actual / predicted
            share = 0.0 if share < 0.0 else 1.0 if share > 1.0 else share
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
        if not (_MIN_DRIFT <= drift <= _MAX_DRIFT and 0.0 <= hit_share <= 1.0):
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
            (not self.reserved and self.is_idle)
            or (
                len(self.reserved) + self.num_others < self.instance.max_num_seqs
                and self.kv.num_free_tokens > 0.0
            )
        )

    def is_eligible(self, need: Need, exclude: Collection[str]) -> bool:
        """Whether it may get a call, now or later."""
        if not self.healthy or need.num_at_most > self.kv.num_tokens:
            return False
        instance = self.instance
        if instance.models and need.model and need.model not in instance.models:
            return False
        return not exclude or instance.instance_id not in exclude

    def can_start(self, need: Need) -> bool:
        """Whether it has a seat and KV blocks for a call now, if it has room at all."""
        if not self.reserved and self.is_idle:
            return True
        kv, num_own_tokens = self.kv, need.num_own_tokens
        free = kv.num_tokens - kv.num_used_tokens - kv.num_other_tokens
        return num_own_tokens <= free and kv.num_new_tokens(need.prefix, num_own_tokens) <= free

    def alone_s(self, need: Need) -> float:
        """Service of a call here if nothing else ran."""
        on_model = need.on_model.get(self.latency_id) or self._on_model(need)
        num_cached, _ = self._num_cached(need)
        prefill_s = on_model.prefill_s
        if num_cached != on_model.num_cached:
            prefill_s = self._prefill_s(need, on_model, num_cached)
        return self.drift * (prefill_s + need.num_decoded * on_model.alone_step_s)

    def predict(self, need: Need, now: float) -> Candidate:
        """Say what a call would cost here."""
        instance, kv, drift = self.instance, self.kv, self.drift
        latency, num_ahead = instance.latency, len(self.reserved) + self.num_others
        on_model = need.on_model.get(self.latency_id) or self._on_model(need)
        num_cached, num_new = self._num_cached(need)
        prefill_s = on_model.prefill_s
        if num_cached != on_model.num_cached:
            prefill_s = self._prefill_s(need, on_model, num_cached)
        queue_s, num_beside = 0.0, num_ahead
        if (
            num_ahead >= instance.max_num_seqs
            or num_new > kv.num_tokens - kv.num_used_tokens - kv.num_other_tokens
        ) and (self.reserved or not self.is_idle):
            queue_s, num_beside = self._room_s(num_new, now)
        num_decoded, context = need.num_decoded, need.context
        slowdown_s, stretch = 0.0, 1.0
        if num_beside:
            step_s, step_without_s = latency.joined_steps_s(num_beside, context)
            together_s = num_decoded * step_s
            slowdown_s = together_s - num_decoded * step_without_s
            stretch = step_s / on_model.alone_step_s
        else:
            together_s = num_decoded * on_model.alone_step_s
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

    def _num_cached(self, need: Need) -> tuple[int, float]:
        """Prompt tokens that need no prefill here, KV tokens that a call would take."""
        num_new = need.num_own_tokens
        if not need.prefix:
            return 0, num_new
        num_held, num_new = self.kv.probe(need.prefix, num_new)
        if num_held >= need.num_prompt_tokens:
            num_held = need.num_prompt_tokens - 1
        return int(self.hit_share * num_held), num_new

    def _on_model(self, need: Need) -> _OnModel:
        step_s = self.instance.latency.decode_step_s(1, need.context)
        on_model = need.on_model[self.latency_id] = _OnModel(step_s)
        return on_model

    def _prefill_s(self, need: Need, on_model: _OnModel, num_cached: int) -> float:
        on_model.num_cached = num_cached
        on_model.prefill_s = self.instance.latency.prefill_s(
            need.num_prompt_tokens - num_cached, num_cached_tokens=num_cached
        )
        return on_model.prefill_s

    def own_wait_s(self, need: Need, now: float) -> float:
        """Seconds until calls of this ledger end and leave room; `inf` if only others' can."""
        _, num_new = self._num_cached(need)
        return self._room_s(num_new, now, others_s=_INF)[0]

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
            (
                r.end_time if r.end_time > now else now + _OVERDUE_SHARE * (now - r.start_time),
                r.num_tokens,
                1,
                1,
            )
            for r in self.reserved.values()
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
    return left_s / needed_s if 0.0 < needed_s <= left_s else _INF


def _capacity(instance: Instance) -> float:
    return _INF if instance.num_kv_tokens is None else instance.num_kv_tokens


def _as_drift(ratio: float) -> float:
    """Return the nearest that a drift factor can be."""
    if ratio < _MIN_DRIFT:
        return _MIN_DRIFT
    return _MAX_DRIFT if ratio > _MAX_DRIFT else ratio


def latency_fingerprint(latency: LatencyModel) -> str:
    """Return what tells one latency model from another."""
    return sha256(repr(latency).encode()).hexdigest()[:12]
