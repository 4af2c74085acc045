"""Which probes a server is measured with: prompt sizes, and batch sizes times contexts."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_workflow.core.errors import ConfigError

SMALLEST_PROMPT = 32
_CONTEXTS = (128, 1024, 4096)
_WINDOW_STEPS = 24
"""Steps that all requests of a batch decode together."""
_KV_SHARE = 0.5
"""Of the KV cache that a probe may fill, so that nothing is preempted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """`num_seqs` equal requests, each sent when the one before it has its first token."""

    num_seqs: int
    num_prompt_tokens: int
    num_output_tokens: int
    recorded: bool = True
    """False for a warm-up."""

    @property
    def measures_prefill(self) -> bool:
        return self.num_output_tokens == 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How much load the server may be put under."""

    max_prompt_tokens: int = 8192
    """Longest prompt; shorter if the server takes less."""
    max_num_seqs: int = 32
    """Most requests at a time."""
    num_repeats: int = 3
    max_seconds: float = 300.0
    """After which no further probe is begun."""

    def __post_init__(self) -> None:
        for name, least in (
            ("max_prompt_tokens", 2 * SMALLEST_PROMPT),
            ("max_num_seqs", 1),
            ("num_repeats", 1),
        ):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        if not self.max_seconds > 0.0:
            raise ConfigError(f"max_seconds: expected a number above 0, got {self.max_seconds}")


def plan(limits: Limits, *, max_model_len: int, num_kv_tokens: int | None) -> list[Probe]:
    """Return probes in the order to run them, warm-up first, the small before the large.

    Args:
        limits: Of the load.
        max_model_len: Longest sequence that the server takes.
        num_kv_tokens: What the KV cache holds, None if that is not known.

    Raises:
        ConfigError: The server takes too short sequences to learn from.
    """
    room = num_kv_tokens * _KV_SHARE if num_kv_tokens is not None else float("inf")
    longest = int(min(limits.max_prompt_tokens, max_model_len - 2, room))
    if longest < 2 * SMALLEST_PROMPT:
        raise ConfigError(
            f"profile: expected a server that takes {2 * SMALLEST_PROMPT} prompt tokens, got one "
            f"that takes {longest} (max_model_len {max_model_len}, KV tokens {num_kv_tokens})"
        )
    prefills = [_prefill(size) for size in _powers(SMALLEST_PROMPT, longest)]
    decodes = [
        probe
        for context in _CONTEXTS
        for batch in _powers(1, limits.max_num_seqs)
        if (probe := _decode(batch, context)).num_prompt_tokens <= longest
        and probe.num_prompt_tokens + probe.num_output_tokens <= max_model_len
        and batch * (probe.num_prompt_tokens + probe.num_output_tokens) <= room
    ] or [_decode(1, SMALLEST_PROMPT)]
    warm_up = [
        Probe(
            num_seqs=p.num_seqs,
            num_prompt_tokens=p.num_prompt_tokens,
            num_output_tokens=p.num_output_tokens,
            recorded=False,
        )
        for p in (*prefills, max(decodes, key=lambda d: (d.num_seqs, -d.num_prompt_tokens)))
    ]
    once = sorted((*prefills, *decodes), key=_tokens)
    return [*warm_up, *(probe for _ in range(limits.num_repeats) for probe in once)]


def _tokens(probe: Probe) -> int:
    return probe.num_seqs * (probe.num_prompt_tokens + probe.num_output_tokens)


def _prefill(num_tokens: int) -> Probe:
    return Probe(num_seqs=1, num_prompt_tokens=num_tokens, num_output_tokens=1)


def _decode(num_seqs: int, num_prompt_tokens: int) -> Probe:
    """The first request decodes alone until the last one has joined; hence one step for each."""
    return Probe(
        num_seqs=num_seqs,
        num_prompt_tokens=num_prompt_tokens,
        num_output_tokens=num_seqs + _WINDOW_STEPS,
    )


def _powers(first: int, last: int) -> list[int]:
    """`first` doubled up to `last`, and `last` itself."""
    sizes = []
    while first < last:
        sizes.append(first)
        first *= 2
    return [*sizes, last]
