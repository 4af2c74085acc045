"""How many tokens a call has and will have, before anybody counted them."""

from __future__ import annotations

from dataclasses import dataclass, field

PRIOR_OUTPUT_TOKENS = 64.0
"""Expected output of a stage never seen and never declared."""
PRIOR_TOKENS_PER_BYTE = 0.25
"""English text under common BPE vocabularies."""
_PRIOR_WEIGHT = 4.0
"""How many observations a declared value counts for."""
_MAX_STAGES = 4096
"""Names come from clients, so they must not fill the memory: the least recently seen one goes."""
_MEMORY = 200.0
"""Observations after which older ones fade, so that a changed prompt is noticed."""


@dataclass(slots=True)
class _Mean:
    value: float
    weight: float = _PRIOR_WEIGHT

    def add(self, observed: float) -> None:
        self.weight = min(self.weight + 1.0, _MEMORY)
        self.value += (observed - self.value) / self.weight


@dataclass(slots=True)
class Lengths:
    """Mean output tokens per (workflow, stage), and tokens per byte of prompt, as observed."""

    _output: dict[tuple[str, str], _Mean] = field(default_factory=dict)
    _tokens_per_byte: _Mean = field(default_factory=lambda: _Mean(PRIOR_TOKENS_PER_BYTE))

    def declare(self, workflow: str, stage: str, output_tokens: float) -> None:
        """Seed the mean of a stage with what its author expects."""
        self._output[workflow, stage] = _Mean(output_tokens)

    def output_tokens(self, workflow: str, stage: str, max_tokens: int | None = None) -> float:
        """Expected output tokens, at least 1 and at most `max_tokens`."""
        known = self._output.get((workflow, stage))
        expected = known.value if known else PRIOR_OUTPUT_TOKENS
        return max(1.0, min(expected, max_tokens) if max_tokens else expected)

    def prompt_tokens(self, num_bytes: int) -> int:
        """Expected tokens of a prompt of `num_bytes` bytes of text, at least 1."""
        return max(1, round(num_bytes * self._tokens_per_byte.value))

    def observe(
        self, workflow: str, stage: str, *, output_tokens: int | None, tokens_per_byte: float | None
    ) -> None:
        """Learn from one call that ended well; None for what was not counted."""
        if output_tokens is not None:
            key = (workflow, stage)
            mean = self._output.pop(key, None) or _Mean(PRIOR_OUTPUT_TOKENS, weight=0.0)
            mean.add(output_tokens)
            self._output[key] = mean
            if len(self._output) > _MAX_STAGES:
                del self._output[next(iter(self._output))]
        if tokens_per_byte is not None:
            self._tokens_per_byte.add(tokens_per_byte)
