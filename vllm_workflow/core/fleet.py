"""What the router knows of its instances: the ledger of the work in flight.

Owned by a single event loop (or a single simulation). Methods are synchronous, so no lock
is needed and no decision can interleave with another.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

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


class _Reserved(NamedTuple):
    service_s: float
    start_time: float
    end_time: float
    """As predicted when it was sent."""
    num_tokens: float
    """Of the KV cache, that nobody else needed then."""
    max_stretch: float
    """By which its instance may be slower than for one call alone without making it late."""


@dataclass(slots=True)
class _Account:
    instance: Instance
    kv: KvLedger
    healthy: bool = True
    leaving: bool = False
    """Removed, but for the calls that are still in flight on it."""
    reserved: dict[str, _Reserved] = field(default_factory=dict)
    outstanding_s: float = 0.0
    drift: float = 1.0
    """Actual over predicted service, smoothed."""
    num_observed: int = 0
    hit_share: float = 1.0
    """Of the prompt tokens that should be in its prefix cache, those that were."""

    @property
    def has_room(self) -> bool:
        """Whether it can start a further call, if it is a small one; an idle one takes any."""
        return self.healthy and (
            not self.reserved
            or (len(self.reserved) < self.instance.max_num_seqs and self.kv.num_free_tokens > 0.0)
        )


class Fleet:
    """Predicts candidates and keeps account of the calls in flight."""

    def __init__(self) -> None:
        self._accounts: dict[str, _Account] = {}
        self.version = 0
        """Grows with whatever may have made room for a further call."""

    def add(self, instance: Instance) -> None:
        """Add or replace an instance; calls in flight on it stay counted."""
        self.version += 1
        instance = self._sharing_latency(instance)
        account = self._accounts.get(instance.instance_id)
        if account is None:
            self._accounts[instance.instance_id] = _Account(instance, KvLedger(_capacity(instance)))
        else:
            account.leaving = False
            account.instance = instance
            account.kv.resize(_capacity(instance))

    def _sharing_latency(self, instance: Instance) -> Instance:
        """Equal latency models become one object, so that each is asked once per call."""
        for other in self._accounts.values():
            if other.instance.latency == instance.latency:
                return replace(instance, latency=other.instance.latency)
        return instance

    def remove(self, instance_id: str) -> None:
        """Take an instance out: it gets no more calls, those in flight on it stay counted.

        It comes back with `add`, and is forgotten by `forget` when its last call has ended.
        """
        account = self._accounts[instance_id]
        account.leaving, account.healthy = True, False
        self.version += 1
        self.forget(instance_id)

    def forget(self, instance_id: str) -> None:
        """Drop an instance that was removed and has no call in flight; else do nothing."""
        account = self._accounts.get(instance_id)
        if account is not None and account.leaving and not account.reserved:
            del self._accounts[instance_id]

    def __contains__(self, instance_id: object) -> bool:
        """Whether an instance is there and was not removed."""
        account = self._accounts.get(instance_id)  # type: ignore[call-overload]
        return account is not None and not account.leaving

    def mark(self, instance_id: str, *, healthy: bool) -> None:
        """Note whether calls may be sent to an instance that was not removed."""
        account = self._accounts[instance_id]
        if healthy and not account.healthy:
            account.kv.clear()  # it may have been restarted
        account.healthy = healthy
        self.version += 1

    def is_healthy(self, instance_id: str) -> bool:
        account = self._accounts.get(instance_id)
        return account is not None and account.healthy

    def instance(self, instance_id: str) -> Instance:
        """Return an instance as configured."""
        return self._accounts[instance_id].instance

    def __iter__(self) -> Iterator[Instance]:
        return (a.instance for a in self._accounts.values() if not a.leaving)

    def serves(self, model: str) -> bool:
        """Whether any instance, healthy or not, serves `model`."""
        return any(instance.serves(model) for instance in self)

    def candidates(
        self, request: StageRequest, *, now: float = 0.0, exclude: Collection[str] = ()
    ) -> tuple[Candidate, ...]:
        """Predict `request` on every healthy instance that serves its model and can hold it."""
        num_own_tokens = _num_own_tokens(request)
        num_at_most = self._num_at_most(request)
        prefills: dict[tuple[int, int], float] = {}  # instances of one kind share a latency model
        found: list[Candidate] = []
        for account in self._accounts.values():
            instance = account.instance
            if (
                not account.healthy
                or instance.instance_id in exclude
                or not instance.serves(request.model)
                or num_at_most > account.kv.num_tokens
            ):
                continue
            num_cached = 0
            if request.prefix:
                num_held = account.kv.num_cached_tokens(request.prefix)
                num_cached = int(account.hit_share * min(num_held, request.num_prompt_tokens - 1))
            key = (id(instance.latency), num_cached)
            prefill_s = prefills.get(key)
            if prefill_s is None:
                prefill_s = prefills[key] = instance.latency.prefill_s(
                    request.num_prompt_tokens - num_cached, num_cached_tokens=num_cached
                )
            num_new_tokens = account.kv.num_new_tokens(request.prefix, num_own_tokens)
            found.append(_predict(account, request, prefill_s, num_cached, num_new_tokens, now))
        return tuple(found)

    def has_room(self, model: str = "", exclude: Collection[str] = ()) -> bool:
        """Whether a healthy instance of a model can start a further call, if it is a small one."""
        return any(
            account.has_room
            and account.instance.instance_id not in exclude
            and account.instance.serves(model)
            for account in self._accounts.values()
        )

    def serves_now(self, model: str, exclude: Collection[str] = ()) -> bool:
        """Whether any healthy instance outside `exclude` serves `model`."""
        return any(
            account.healthy
            and account.instance.instance_id not in exclude
            and account.instance.serves(model)
            for account in self._accounts.values()
        )

    def can_start(self, request: StageRequest, exclude: Collection[str] = ()) -> bool:
        """Whether any healthy instance has a seat and KV blocks for `request` now."""
        num_own_tokens = _num_own_tokens(request)
        num_at_most = self._num_at_most(request)
        return any(
            account.has_room
            and (
                not account.reserved
                or account.kv.num_new_tokens(request.prefix, num_own_tokens)
                <= account.kv.num_free_tokens
            )
            and account.instance.instance_id not in exclude
            and account.instance.serves(request.model)
            and num_at_most <= account.kv.num_tokens
            for account in self._accounts.values()
        )

    def _num_at_most(self, request: StageRequest) -> int:
        """Tokens that an instance must be able to hold; 0 if none can hold what is guessed.

        A prompt's tokens are guessed from its bytes, which may be an image: then it is for an
        engine to refuse the call.
        """
        num_tokens = request.num_tokens_at_most
        largest = max(
            (
                a.kv.num_tokens
                for a in self._accounts.values()
                if not a.leaving and a.instance.serves(request.model)
            ),
            default=0.0,
        )
        return num_tokens if num_tokens <= largest else 0

    def bears(self, candidate: Candidate, *, margin: float) -> bool:
        """Whether the calls on an instance can bear one more without being made late by it.

        Args:
            candidate: With its `stretch`.
            margin: Kept in reserve, as a share of what is predicted: prompts of later calls
                and wrong guesses of lengths come on top.
        """
        reserved = self._accounts[candidate.instance_id].reserved.values()
        limit = min((r.max_stretch for r in reserved), default=math.inf)
        return candidate.stretch * (1.0 + margin) <= limit

    def observe_cached(self, instance_id: str, *, predicted: int, actual: int) -> None:
        """Learn how far an instance's prefix cache holds what it is believed to hold.

        Args:
            instance_id: Where a call ran.
            predicted: `num_cached_tokens` of its candidate; 0 says nothing.
            actual: As the engine counted.
        """
        if predicted > 0:
            account = self._accounts[instance_id]
            share = min(max(actual / predicted, 0.0), 1.0)
            account.hit_share += _MIN_DRIFT_WEIGHT * (share - account.hit_share)

    def mean_service_s(self, model: str, num_prompt_tokens: int, num_output_tokens: float) -> float:
        """Service of one such call on an idle instance, mean over those that serve `model`.

        Unhealthy ones count only if all are, so that a prediction does not jump to 0.
        """
        serving = [a for a in self._accounts.values() if a.instance.serves(model)]
        serving = [a for a in serving if a.healthy] or serving
        each = [
            a.drift * _idle_service_s(a.instance.latency, num_prompt_tokens, num_output_tokens)
            for a in serving
        ]
        return sum(each) / len(each) if each else 0.0

    def reserve(
        self,
        request_id: str,
        candidate: Candidate,
        *,
        now: float = 0.0,
        request: StageRequest | None = None,
    ) -> None:
        """Count a call against its instance until `release`.

        Args:
            request_id: Of the call.
            candidate: The instance, and the prediction that led to it.
            now: Instant at which it is sent.
            request: Says what it takes of the KV cache; None: nothing.

        Raises:
            ValueError: The request is already reserved there.
        """
        account = self._accounts[candidate.instance_id]
        if request_id in account.reserved:
            raise ValueError(
                f"request {request_id!r} is already reserved on instance {candidate.instance_id!r}"
            )
        num_tokens = 0.0
        if request is not None:
            num_own_tokens = _num_own_tokens(request)
            num_tokens = account.kv.num_new_tokens(request.prefix, num_own_tokens)
            account.kv.admit(request_id, request.prefix, num_own_tokens)
        account.reserved[request_id] = _Reserved(
            candidate.service_s,
            now,
            now + candidate.finish_s,
            num_tokens,
            math.inf if request is None else max_stretch(request, candidate, now),
        )
        account.outstanding_s += candidate.service_s

    def release(self, request_id: str, instance_id: str, *, ran: bool = True) -> None:
        """Stop counting a call, however it ended. Safe to call twice.

        Args:
            request_id: Of the call.
            instance_id: Where it was reserved.
            ran: Its prompt was computed, so the instance now holds it.
        """
        account = self._accounts[instance_id]
        reserved = account.reserved.pop(request_id, None)
        if reserved is not None:
            self.version += 1
            account.kv.release(request_id, keep=ran)
            left_s = account.outstanding_s - reserved.service_s
            account.outstanding_s = max(0.0, left_s) if account.reserved else 0.0

    def observe(self, instance_id: str, *, predicted_s: float, actual_s: float) -> None:
        """Correct an instance's speed by one finished call.

        Args:
            instance_id: Where it ran.
            predicted_s: From dispatch to end, for the tokens it turned out to have: a wrong
                guess of a length says nothing about speed.
            actual_s: The same as measured; `nan` is ignored.
        """
        account = self._accounts[instance_id]
        ratio = actual_s / predicted_s if predicted_s > 0.0 else 1.0
        if math.isfinite(ratio) and ratio > 0.0:
            account.num_observed += 1
            weight = max(_MIN_DRIFT_WEIGHT, 1.0 / (_PRIOR_DRIFT_WEIGHT + account.num_observed))
            step = weight * math.log(min(max(ratio, 1 / _MAX_DRIFT), _MAX_DRIFT))
            drift = account.drift * math.exp(step)
            account.drift = min(max(drift, 1 / _MAX_DRIFT), _MAX_DRIFT)

    def drift(self, instance_id: str) -> float:
        """Actual over predicted service of the latest calls; 1 is as predicted."""
        return self._accounts[instance_id].drift

    def num_outstanding(self, instance_id: str | None = None) -> int:
        """Calls in flight on one instance, or on all."""
        if instance_id is not None:
            account = self._accounts.get(instance_id)
            return 0 if account is None else len(account.reserved)
        return sum(len(a.reserved) for a in self._accounts.values())

    def outstanding_s(self, instance_id: str) -> float:
        """Predicted service of the calls in flight on an instance, summed."""
        return self._accounts[instance_id].outstanding_s


def _idle_service_s(latency: LatencyModel, num_prompt_tokens: int, output_tokens: float) -> float:
    return latency.prefill_s(num_prompt_tokens) + latency.decode_s(
        max(0.0, output_tokens - 1.0), batch_size=1, num_context_tokens=num_prompt_tokens
    )


def _num_own_tokens(request: StageRequest) -> float:
    """KV tokens that no other call shares: the rest of its prompt, and its answer."""
    num_head_tokens = sum(segment.num_tokens for segment in request.prefix)
    return max(0, request.num_prompt_tokens - num_head_tokens) + request.expected_output_tokens


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


def _predict(
    account: _Account,
    request: StageRequest,
    prefill_s: float,
    num_cached_tokens: int,
    num_new_tokens: float,
    now: float,
) -> Candidate:
    instance, num_ahead = account.instance, len(account.reserved)
    latency, seats, drift = instance.latency, instance.max_num_seqs, account.drift
    queue_s = 0.0
    num_beside = num_ahead
    # An idle instance takes any call: no other will end and make more room.
    if num_ahead and (num_ahead >= seats or num_new_tokens > account.kv.num_free_tokens):
        queue_s, num_beside = _room_s(account, num_new_tokens, now)
    num_decoded = request.expected_output_tokens - 1.0
    if num_decoded < 0.0:
        num_decoded = 0.0
    context = request.num_prompt_tokens + 0.5 * request.expected_output_tokens
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
        account.outstanding_s,
        num_cached_tokens,
        stretch,
    )


def _room_s(account: _Account, num_new_tokens: float, now: float) -> tuple[float, int]:
    """Seconds until a call finds a seat and KV room, and how many calls then run beside it.

    Calls are taken to end when it was predicted that they would, those that are overdue after
    a while that grows with their delay, and those sent last to wait for the first ones too.
    """
    seats = account.instance.max_num_seqs
    free = account.kv.num_free_tokens
    left = len(account.reserved)
    until = now
    ends = sorted((_end_time(r, now), r.num_tokens) for r in account.reserved.values())
    for end_time, num_tokens in ends:
        if left < seats and num_new_tokens <= free:
            break
        until = end_time
        free += num_tokens
        left -= 1
    return until - now, left


def _end_time(reserved: _Reserved, now: float) -> float:
    if reserved.end_time > now:
        return reserved.end_time
    return now + _OVERDUE_SHARE * (now - reserved.start_time)
