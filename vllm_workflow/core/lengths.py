"""How many tokens a call has and will have, before anybody counted them.

The length of an answer depends on the stage, and in some stages on the length of the prompt:
two templates behind one stage differ in both. So means are kept per (tenant, workflow, stage) and
half-octave of the prompt, those that were hardly seen near the mean of the stage.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any, Final

from vllm_workflow.core.histogram import Histogram

PRIOR_OUTPUT_TOKENS: Final = 64.0
"""Expected output of a stage never seen and never declared."""
PRIOR_TOKENS_PER_BYTE: Final = 0.25
"""English text under common BPE vocabularies."""
_PRIOR_WEIGHT: Final = 4.0
"""How many observations a declared value counts for, and a stage's mean in each of its buckets."""
_MAX_STAGES: Final = 4096
"""Names come from clients, so they must not fill the memory: the least recently seen one goes."""
_MEMORY: Final = 200.0
"""Observations after which older ones fade, so that a changed prompt is noticed."""
_BUCKETS_PER_OCTAVE: Final = 2
"""Of prompts. Half-octaves explain as much as knowing the template, see docs."""

PRIOR, DECLARED, LEARNED, CLIENT = "prior", "declared", "learned", "client"
"""Where a prediction comes from: nowhere, the configuration, runs, the client's own word."""

_NUM_NEW: Final = 32
"""Calls that may wait to be sorted into distributions."""

StageKey = tuple[str, str, str]
"""Tenant, workflow, stage."""


Expected = tuple[float, str]
"""A prediction and where it comes from."""


class Mean:
    """A mean of which old values fade."""

    __slots__ = ("value", "weight")

    def __init__(self, value: float, weight: float = _PRIOR_WEIGHT) -> None:
        self.value = value
        self.weight = weight

    def add(self, observed: float) -> None:
        weight = self.weight + 1.0
        self.weight = weight if weight < _MEMORY else _MEMORY
        self.value += (observed - self.value) / self.weight


class StageLengths:
    """What was counted of the calls of one stage."""

    __slots__ = ("_new", "_outputs", "_prompts", "by_prompt", "mean")

    def __init__(self, mean: Mean) -> None:
        self.mean = mean
        self.by_prompt: dict[int, Mean] = {}
        self._outputs = Histogram()
        self._prompts = Histogram()
        self._new: list[tuple[int, int]] = []

    def counted(self, num_prompt_tokens: int, output_tokens: int) -> None:
        """Put one call down for the distributions."""
        self._new.append((num_prompt_tokens, output_tokens))
        if len(self._new) >= _NUM_NEW:
            self._sort_in()

    def _sort_in(self) -> None:
        for num_prompt_tokens, output_tokens in self._new:
            self._prompts.add(num_prompt_tokens)
            self._outputs.add(output_tokens)
        self._new.clear()

    @property
    def outputs(self) -> Histogram:
        """Tokens of answers."""
        self._sort_in()
        return self._outputs

    @property
    def prompts(self) -> Histogram:
        """Tokens of prompts, as predicted from their bytes."""
        self._sort_in()
        return self._prompts

    def near(self, num_prompt_tokens: int) -> Mean:
        """Answers to prompts of about that length; where there were none, all."""
        position = _position(num_prompt_tokens)
        bucket = int(position)
        found = self.by_prompt.get(bucket)
        if found is None:  # the next bucket on the nearer side
            found = self.by_prompt.get(bucket + 1 if position - bucket > 0.5 else bucket - 1)
        return found or self.mean

    def to_mapping(self) -> dict[str, Any]:
        """Return what `from_mapping` takes."""
        return {
            "mean": [self.mean.value, self.mean.weight],
            "by_prompt": [[b, m.value, m.weight] for b, m in sorted(self.by_prompt.items())],
            "output_tokens": self.outputs.to_mapping(),
            "prompt_tokens": self.prompts.to_mapping(),
        }

    @classmethod
    def from_mapping(cls, data: Mapping[str, Any]) -> StageLengths:
        """Read back what was written.

        Raises:
            KeyError, TypeError, ValueError: `data` is not that.
        """
        value, weight = data["mean"]
        made = cls(Mean(float(value), float(weight)))
        made.by_prompt = {int(b): Mean(float(v), float(w)) for b, v, w in data["by_prompt"]}
        made._outputs = Histogram.from_mapping(data["output_tokens"])
        made._prompts = Histogram.from_mapping(data["prompt_tokens"])
        return made


class Lengths:
    """Output tokens per stage, and tokens per byte of prompt, as observed."""

    def __init__(self) -> None:
        self._stages: OrderedDict[StageKey, StageLengths] = OrderedDict()
        self.changed: set[StageKey] = set()
        """Of which something was learned since somebody emptied this."""
        self._declared: Mapping[tuple[str, str], float] = {}
        self._tokens_per_byte = Mean(PRIOR_TOKENS_PER_BYTE)

    def declare(self, output_tokens: Mapping[tuple[str, str], float]) -> None:
        """Say what the authors expect of stages, by (workflow, stage), whoever the tenant is.

        What was said before no longer counts, but for what was learned since.
        """
        self._declared = dict(output_tokens)

    def output_tokens(
        self, key: StageKey, num_prompt_tokens: int, max_tokens: int | None = None
    ) -> Expected:
        """Expected output tokens, at least 1 and at most `max_tokens`."""
        stage = self._stages.get(key)
        if stage is not None:
            expected, source = stage.near(num_prompt_tokens).value, LEARNED
        else:
            declared = self._declared.get(key[1:])
            expected, source = (
                (PRIOR_OUTPUT_TOKENS, PRIOR) if declared is None else (declared, DECLARED)
            )
        if max_tokens and expected > max_tokens:
            expected = float(max_tokens)
        return (expected if expected > 1.0 else 1.0), source

    def prompt_tokens(self, num_bytes: int) -> int:
        """Expected tokens of a prompt of `num_bytes` bytes of text, at least 1."""
        num_tokens = round(num_bytes * self._tokens_per_byte.value)
        return num_tokens if num_tokens > 1 else 1

    def observe(self, key: StageKey, *, num_prompt_tokens: int, output_tokens: int) -> None:
        """Learn from the answer of a call that ended well.

        Args:
            key: Of its stage.
            num_prompt_tokens: As they were predicted, which is how they will be asked for.
            output_tokens: As they were counted.
        """
        stages = self._stages
        stage = stages.get(key)
        if stage is None:
            declared = self._declared.get(key[1:])
            mean = Mean(0.0, weight=0.0) if declared is None else Mean(declared)
            stage = stages[key] = StageLengths(mean)
            if len(stages) > _MAX_STAGES:
                self.changed.discard(stages.popitem(last=False)[0])
        else:
            stages.move_to_end(key)
        self.changed.add(key)
        bucket = int(_position(num_prompt_tokens))
        stage.mean.add(output_tokens)
        near = stage.by_prompt.get(bucket)
        if near is None:
            near = stage.by_prompt[bucket] = Mean(stage.mean.value)
        near.add(output_tokens)
        stage.counted(num_prompt_tokens, output_tokens)

    def observe_prompt(self, tokens_per_byte: float) -> None:
        """Learn from a prompt that was counted."""
        self._tokens_per_byte.add(tokens_per_byte)

    def tokens_per_byte(self) -> list[float]:
        """The mean and its weight."""
        return [self._tokens_per_byte.value, self._tokens_per_byte.weight]

    def set_tokens_per_byte(self, value: float, weight: float) -> None:
        """Take in what an earlier process had learned.

        Raises:
            ValueError: Not two numbers above 0.
        """
        if not (0.0 < float(value) < math.inf and 0.0 < float(weight) < math.inf):
            raise ValueError(f"expected two numbers above 0, got {value!r} and {weight!r}")
        self._tokens_per_byte = Mean(float(value), float(weight))

    def get(self, key: StageKey) -> StageLengths | None:
        return self._stages.get(key)

    def mark_changed(self) -> None:
        """Have all count as changed."""
        self.changed.update(self._stages)

    def items(self) -> Iterator[tuple[StageKey, StageLengths]]:
        """What was learned, the stage longest without news first."""
        return iter(self._stages.items())

    def restore(self, key: StageKey, stage: StageLengths) -> None:
        """Take in what an earlier process had learned."""
        self._stages[key] = stage
        if len(self._stages) > _MAX_STAGES:
            self._stages.popitem(last=False)


def _position(num_tokens: int) -> float:
    """On the logarithmic scale, in buckets."""
    return _BUCKETS_PER_OCTAVE * math.log2(num_tokens) if num_tokens > 0 else 0.0
