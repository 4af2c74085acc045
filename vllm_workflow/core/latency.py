"""How long an engine step takes. Everything else in seconds is derived from this.

One primitive, `step_s`, is enough: a simulator advances its clock by it, and the router's
estimates per request are derived from it, so both always agree. `hardware.py` predicts a
model from datasheets, `fit.py` from measurements.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields

from vllm_workflow.core.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyModel:
    """Step time of one model on one instance.

        step_s = overhead_s + weights_s
                 + per_token_below_knee_s * min(tokens, knee) + per_token_s * max(0, tokens - knee)
                 + decoding sequences * per_seq_s
                 + context of the decoding sequences * per_kv_token_s
                 + prefill attention * per_prefill_kv_token_s

    The knee: below it a step is bound by reading the weights and a further token is cheap,
    above it by arithmetic. With the defaults of the two fields about it this is the roofline
    `overhead_s + max(weights_s, tokens * per_token_s)`. On real GPUs a token below the knee
    costs two fifths to three fifths of one above it.
    """

    overhead_s: float = 0.002
    """Launch, sampling, scheduling: paid by every step."""
    weights_s: float = 0.010
    """Reading all weights once; the price of a step of one token."""
    per_token_s: float = 0.0001
    """Arithmetic of one token above the knee."""
    per_token_below_knee_s: float = 0.0
    """Of one token below the knee; at most `per_token_s`."""
    num_knee_tokens: float | None = None
    """Tokens of a step at the knee; None: where arithmetic takes as long as the weights."""
    per_seq_s: float = 0.0
    """Logits and sampling of one decoding sequence, beside its token."""
    per_kv_token_s: float = 0.0
    """Attention of one decoding sequence over one token of its context."""
    per_prefill_kv_token_s: float = 0.0
    """Attention of one prompt token over one token before it."""
    max_num_batched_tokens: int = 2048
    """Tokens of one step at most; a longer prompt is prefilled in chunks."""

    _knee: float = field(init=False, repr=False, compare=False, default=0.0)
    _fixed_s: float = field(init=False, repr=False, compare=False, default=0.0)
    _above_s: float = field(init=False, repr=False, compare=False, default=0.0)
    """What a token above the knee costs beyond one below it."""
    _full_s: float = field(init=False, repr=False, compare=False, default=0.0)
    """A step of prompt tokens only, as many as there may be, without their attention."""

    def __post_init__(self) -> None:
        for f in fields(self):
            if not f.init:
                continue
            value = getattr(self, f.name)
            if value is None and f.default is None:
                continue
            if value is None or not 0 <= value < math.inf:
                raise ConfigError(f"latency.{f.name}: expected a number from 0, got {value!r}")
        if self.overhead_s + self.weights_s <= 0.0:
            raise ConfigError("latency: overhead_s and weights_s are both 0; a step takes time")
        if self.max_num_batched_tokens < 1:
            raise ConfigError("latency.max_num_batched_tokens: expected at least 1, got 0")
        if self.per_token_below_knee_s > self.per_token_s:
            raise ConfigError(
                "latency.per_token_below_knee_s: expected at most per_token_s = "
                f"{self.per_token_s!r}, got {self.per_token_below_knee_s!r}"
            )
        knee = self.num_knee_tokens
        if knee is None:
            knee = self.weights_s / self.per_token_s if self.per_token_s > 0.0 else math.inf
        object.__setattr__(self, "_knee", knee)
        object.__setattr__(self, "_fixed_s", self.overhead_s + self.weights_s)
        object.__setattr__(self, "_above_s", self.per_token_s - self.per_token_below_knee_s)
        full_s = self._fixed_s + self._tokens_s(self.max_num_batched_tokens)
        object.__setattr__(self, "_full_s", full_s)

    @property
    def knee_tokens(self) -> float:
        """Tokens of a step from which on it is bound by arithmetic; may be infinite."""
        return self._knee

    def step_s(
        self,
        *,
        num_prefill_tokens: float = 0,
        num_decode_seqs: float = 0,
        num_kv_tokens: float = 0.0,
        prefill_attention: float = 0.0,
    ) -> float:
        """Seconds of one step; positive even for an empty batch.

        Args:
            num_prefill_tokens: Prompt tokens computed in this step, all requests together.
            num_decode_seqs: Sequences that decode one token each.
            num_kv_tokens: Context of the decoding sequences, summed.
            prefill_attention: Context of the prompt tokens, summed; see `prefill_attention`.
        """
        return (
            self._fixed_s
            + self._tokens_s(num_prefill_tokens + num_decode_seqs)
            + num_decode_seqs * self.per_seq_s
            + num_kv_tokens * self.per_kv_token_s
            + prefill_attention * self.per_prefill_kv_token_s
        )

    def _tokens_s(self, num_tokens: float) -> float:
        num_above = num_tokens - self._knee
        tokens_s = num_tokens * self.per_token_below_knee_s
        return tokens_s + num_above * self._above_s if num_above > 0.0 else tokens_s

    def prefill_s(self, num_tokens: int, *, num_cached_tokens: int = 0) -> float:
        """Seconds to prefill in an otherwise idle engine.

        Args:
            num_tokens: Prompt tokens to compute.
            num_cached_tokens: Prompt tokens before them that the prefix cache holds.
        """
        if num_tokens < 1:
            num_tokens = 1
        num_full = num_tokens // self.max_num_batched_tokens
        num_last = num_tokens - num_full * self.max_num_batched_tokens
        full_s = last_s = 0.0
        if num_full:
            full_s = num_full * self._full_s
        if num_last:
            last_s = self._fixed_s + self._tokens_s(num_last)
        attention = num_tokens * (num_cached_tokens + 0.5 * (num_tokens + 1))
        return full_s + last_s + attention * self.per_prefill_kv_token_s

    def decode_s(self, num_tokens: float, *, batch_size: int, num_context_tokens: float) -> float:
        """Seconds to decode `num_tokens` beside `batch_size - 1` sequences like this one.

        Args:
            num_tokens: Output tokens after the first, which prefill gives.
            batch_size: Sequences decoding together, this one included.
            num_context_tokens: Mean context of one of them.
        """
        return num_tokens * self.decode_step_s(batch_size, num_context_tokens)

    def alone_s(self, num_prompt_tokens: int, num_output_tokens: float) -> float:
        """Seconds of a call of so many tokens in an otherwise idle engine, nothing cached."""
        return self.prefill_s(num_prompt_tokens) + self.decode_s(
            max(0.0, num_output_tokens - 1.0), batch_size=1, num_context_tokens=num_prompt_tokens
        )

    def decode_step_s(self, num_seqs: int, num_context_tokens: float) -> float:
        """Seconds of a step of nothing but `num_seqs` decodes of that mean context."""
        num_above = num_seqs - self._knee  # `step_s` without the terms that are 0
        tokens_s = num_seqs * self.per_token_below_knee_s
        if num_above > 0.0:
            tokens_s += num_above * self._above_s
        return (
            self._fixed_s
            + tokens_s
            + num_seqs * self.per_seq_s
            + num_seqs * num_context_tokens * self.per_kv_token_s
        )

    def joined_steps_s(self, num_seqs: int, num_context_tokens: float) -> tuple[float, float]:
        """`decode_step_s` of one sequence more, and of `num_seqs`."""
        fixed_s, below_s, seq_s = self._fixed_s, self.per_token_below_knee_s, self.per_seq_s
        kv_s, num_more = self.per_kv_token_s, num_seqs + 1
        tokens_s, more_s = num_seqs * below_s, num_more * below_s
        if num_more > self._knee:
            more_s += (num_more - self._knee) * self._above_s
            if num_seqs > self._knee:
                tokens_s += (num_seqs - self._knee) * self._above_s
        return (
            fixed_s + more_s + num_more * seq_s + num_more * num_context_tokens * kv_s,
            fixed_s + tokens_s + num_seqs * seq_s + num_seqs * num_context_tokens * kv_s,
        )


def prefill_attention(num_tokens: float, num_context_tokens: float = 0.0) -> float:
    """Tokens that `num_tokens` prompt tokens attend to, summed, themselves included.

    Does not depend on the chunks that they are computed in.

    Args:
        num_tokens: Prompt tokens that are computed.
        num_context_tokens: Tokens of the same prompt that were computed or cached before.
    """
    return num_tokens * (num_context_tokens + 0.5 * (num_tokens + 1))


def shared_out(each_s: Sequence[float]) -> float:
    """What a call takes on average if all instances are kept equally busy: a harmonic mean.

    A fast instance then has as many more of the calls as it is faster. Counted once each, a few
    slow instances that hardly get any would make every run look long.

    Args:
        each_s: Seconds on each instance; not empty.
    """
    rates = 0.0
    for seconds in each_s:
        if seconds <= 0.0:
            return 0.0
        rates += 1.0 / seconds
    return len(each_s) / rates
