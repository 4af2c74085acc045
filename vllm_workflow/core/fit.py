"""Latency models from measured durations: non-negative least squares, pulled to a prior.

A duration is a sum of steps, and a step's time is linear in its load once the knee is fixed;
so any mixture of single steps, first-token times and decode windows is one linear system.
The knee is searched on a grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vllm_workflow.core.errors import ConfigError
from vllm_workflow.core.latency import LatencyModel
from vllm_workflow.core.nnls import solve_nonnegative

REQUEST_S = 0.005
"""What a request costs outside the engine's steps, until measured: HTTP, tokenising."""
RIDGE = 0.03
"""Summed squared relative error that a coefficient is allowed to cost before it is moved from
the prior by its own size. Thirty observations that are 3 % off cost as much."""
_UNKNOWN_ATTENTION = 0.1
"""Without a prior: prefill attention explains little, as it does below some 10k tokens, unless
the data insist; it is nearly collinear with the price of a token."""
_LOOSENESS = (1.0, 1.0, 1.0, 4.0, 1.0, 1.0, 4.0)
"""How many times its own size a coefficient of the prior may be wrong by: prices of a sequence
and of a request depend on the host, which the prior does not know."""
_KNEE_FACTORS = tuple(2.0 ** (k / 2) for k in range(-5, 6))
_PLAIN_KNEES = tuple(32 * 2.0 ** (k / 2) for k in range(13))
"""Tried without a prior: 32 to 2048 tokens."""
_FIXED, _BELOW, _ABOVE, _SEQ, _KV, _ATTENTION, _REQUEST = range(7)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLoad:
    """`count` steps of one load; what `LatencyModel.step_s` takes."""

    count: float = 1.0
    num_prefill_tokens: float = 0.0
    num_decode_seqs: float = 0.0
    num_kv_tokens: float = 0.0
    prefill_attention: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """A measured duration and the steps that it consisted of."""

    seconds: float
    loads: tuple[StepLoad, ...]
    num_requests: float = 0.0
    """Requests whose way through the server is part of the duration: 1 for a TTFT."""

    def predicted_s(self, model: LatencyModel, request_s: float = 0.0) -> float:
        """Seconds that a model gives these steps, with `request_s` per request."""
        return self.num_requests * request_s + sum(
            load.count
            * model.step_s(
                num_prefill_tokens=load.num_prefill_tokens,
                num_decode_seqs=load.num_decode_seqs,
                num_kv_tokens=load.num_kv_tokens,
                prefill_attention=load.prefill_attention,
            )
            for load in self.loads
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """A fitted model and how well it explains what it was fitted to."""

    latency: LatencyModel
    request_s: float
    num_observations: int
    mean_error: float
    """Mean of |predicted - measured| / measured."""
    p90_error: float
    bias: float
    """Mean of (predicted - measured) / measured."""

    @property
    def residuals(self) -> dict[str, float]:
        """The errors, as a profile file has them."""
        return {
            "num_observations": self.num_observations,
            "mean_error": round(self.mean_error, 5),
            "p90_error": round(self.p90_error, 5),
            "bias": round(self.bias, 5),
        }


@dataclass(frozen=True, slots=True)
class _Pull:
    """Where the ridge pulls: coefficients are expressed in `scales`, to which `targets` refer."""

    scales: tuple[float, ...]
    targets: tuple[float, ...]


def fit(
    observations: Sequence[Observation],
    prior: LatencyModel | None = None,
    *,
    ridge: float = RIDGE,
    max_num_batched_tokens: int | None = None,
) -> Fit:
    """Fit a latency model; the squared *relative* error counts, so that short steps do too.

    Args:
        observations: At least one with a prior, at least eight without.
        prior: Where coefficients stay that the observations say nothing about. It decides
            as well how the fixed part of a step is split into overhead and weights.
        ridge: Weight of the prior, see `RIDGE`; it counts less the more was observed.
        max_num_batched_tokens: Of the result; the prior's by default.

    Raises:
        ConfigError: Too few observations, or one whose numbers make no sense.
    """
    _check(observations, least=1 if prior else 8)
    if max_num_batched_tokens is None:
        max_num_batched_tokens = (prior or LatencyModel()).max_num_batched_tokens
    ridge /= len(observations)
    prior_knee = prior.knee_tokens if prior else math.inf
    has_knee = 0.0 < prior_knee < math.inf
    knees = [prior_knee * f for f in _KNEE_FACTORS] if has_knee else list(_PLAIN_KNEES)
    best: tuple[float, float, list[float]] | None = None
    for knee in knees:
        loss, coefficients = _fit_at(observations, knee, prior, ridge)
        if has_knee:
            loss += ridge * math.log(knee / prior_knee) ** 2
        if best is None or loss < best[0] - 1e-12:
            best = (loss, knee, coefficients)
    assert best is not None
    latency = _model(best[2], best[1], prior, max_num_batched_tokens)
    return evaluate(observations, latency, best[2][_REQUEST])


def evaluate(
    observations: Sequence[Observation], latency: LatencyModel, request_s: float = 0.0
) -> Fit:
    """Say how well a model explains observations, whether it was fitted to them or not."""
    _check(observations, least=1)
    ratios = [o.predicted_s(latency, request_s) / o.seconds - 1.0 for o in observations]
    errors = sorted(abs(r) for r in ratios)
    return Fit(
        latency=latency,
        request_s=request_s,
        num_observations=len(ratios),
        mean_error=sum(errors) / len(errors),
        p90_error=errors[math.ceil(0.9 * len(errors)) - 1],
        bias=sum(ratios) / len(ratios),
    )


def _fit_at(
    observations: Sequence[Observation], knee: float, prior: LatencyModel | None, ridge: float
) -> tuple[float, list[float]]:
    """Return mean squared relative error plus ridge at one knee, and the coefficients."""
    rows = [[value / o.seconds for value in _features(o, knee)] for o in observations]
    pull = _pull(rows, prior)
    size, share = len(pull.scales), 1.0 / len(rows)
    gram = [[0.0] * size for _ in range(size)]
    moment = [0.0] * size
    for row in rows:
        scaled = [value * scale for value, scale in zip(row, pull.scales)]
        for i, a in enumerate(scaled):
            if a:
                moment[i] += share * a
                for j, b in enumerate(scaled):
                    gram[i][j] += share * a * b
    for i, target in enumerate(pull.targets):
        gram[i][i] += ridge
        moment[i] += ridge * target
    theta = solve_nonnegative(gram, moment)
    coefficients = [t * scale for t, scale in zip(theta, pull.scales)]
    loss = ridge * sum((t - target) ** 2 for t, target in zip(theta, pull.targets))
    for row in rows:
        error = sum(value * c for value, c in zip(row, coefficients)) - 1.0
        loss += share * error * error
    return loss, coefficients


def _features(observation: Observation, knee: float) -> list[float]:
    totals = [0.0] * 7
    totals[_REQUEST] = observation.num_requests
    for load in observation.loads:
        num_tokens = load.num_prefill_tokens + load.num_decode_seqs
        totals[_FIXED] += load.count
        totals[_BELOW] += load.count * num_tokens
        totals[_ABOVE] += load.count * max(0.0, num_tokens - knee)
        totals[_SEQ] += load.count * load.num_decode_seqs
        totals[_KV] += load.count * load.num_kv_tokens
        totals[_ATTENTION] += load.count * load.prefill_attention
    return totals


def _pull(rows: Sequence[Sequence[float]], prior: LatencyModel | None) -> _Pull:
    """Pull to the prior where it has a number, to 0 where it has none."""
    known = [0.0] * 7
    if prior:
        known = [
            prior.overhead_s + prior.weights_s,
            prior.per_token_below_knee_s,
            prior.per_token_s - prior.per_token_below_knee_s,
            prior.per_seq_s,
            prior.per_kv_token_s,
            prior.per_prefill_kv_token_s,
            REQUEST_S,
        ]
    means = [sum(row[i] for row in rows) / len(rows) for i in range(7)]
    # Without a number: the coefficient that would explain the durations alone.
    scales = [
        k * loose or (1.0 / m if m > 0.0 else 1.0) for k, loose, m in zip(known, _LOOSENESS, means)
    ]
    if not known[_ATTENTION]:
        scales[_ATTENTION] *= _UNKNOWN_ATTENTION
    targets = tuple(1.0 / loose if k else 0.0 for k, loose in zip(known, _LOOSENESS))
    return _Pull(tuple(scales), targets)


def _model(
    coefficients: Sequence[float],
    knee: float,
    prior: LatencyModel | None,
    max_num_batched_tokens: int,
) -> LatencyModel:
    fixed_s = max(coefficients[_FIXED], 1e-6)
    overhead_share = 0.0
    if prior:
        overhead_share = prior.overhead_s / (prior.overhead_s + prior.weights_s)
    return LatencyModel(
        overhead_s=overhead_share * fixed_s,
        weights_s=(1.0 - overhead_share) * fixed_s,
        per_token_s=coefficients[_BELOW] + coefficients[_ABOVE],
        per_token_below_knee_s=coefficients[_BELOW],
        num_knee_tokens=knee,
        per_seq_s=coefficients[_SEQ],
        per_kv_token_s=coefficients[_KV],
        per_prefill_kv_token_s=coefficients[_ATTENTION],
        max_num_batched_tokens=max_num_batched_tokens,
    )


def _check(observations: Sequence[Observation], *, least: int) -> None:
    if len(observations) < least:
        raise ConfigError(f"fit: expected at least {least} observations, got {len(observations)}")
    for i, o in enumerate(observations):
        if not 0.0 < o.seconds < math.inf:
            raise ConfigError(
                f"observation {i}: seconds: expected a number above 0, got {o.seconds!r}"
            )
        for value in (v for v in _features(o, 0.0) if not 0.0 <= v < math.inf):
            raise ConfigError(f"observation {i}: loads: expected numbers from 0, got {value!r}")
