"""Which prompt tokens a prefix cache without limits would have held already."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from vllm_workflow.sim.types import PrefixPart, TraceRun


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharing:
    """Prompt tokens of one call."""

    num_within_tokens: int
    """An earlier call of the same run began with them too."""
    num_across_tokens: int
    """Only calls of earlier runs did."""
    num_new_tokens: int

    @property
    def num_cached_tokens(self) -> int:
        return self.num_within_tokens + self.num_across_tokens


@dataclass(slots=True)
class _Node:
    """A chain of parts that some prompt began with."""

    last_run: int = -1
    after: dict[PrefixPart, _Node] = field(default_factory=dict)


def sharing(runs: Sequence[TraceRun]) -> list[list[Sharing]]:
    """Return for each call of each run what an infinite cache would have held of its prompt.

    Runs and calls come in their order in the trace, and a prompt is in the cache as soon as
    its call was made: an upper bound of what a real cache can reach.
    """
    root = _Node()
    return [
        [_insert(root, index, call.prefix, call.num_prompt_tokens) for call in run.calls]
        for index, run in enumerate(runs)
    ]


def _insert(root: _Node, run: int, prefix: Sequence[PrefixPart], num_prompt_tokens: int) -> Sharing:
    num_within = num_across = 0
    node = root
    for part in prefix:
        found = node.after.get(part)
        if found is None:
            found = node.after[part] = _Node()
        elif found.last_run == run:
            num_within += part.num_tokens
        else:
            num_across += part.num_tokens
        found.last_run = run
        node = found
    return Sharing(
        num_within_tokens=num_within,
        num_across_tokens=num_across,
        num_new_tokens=num_prompt_tokens - num_within - num_across,
    )
