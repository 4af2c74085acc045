"""What an instance says of its own load: calls and KV cache, whoever sent them."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import NamedTuple

_SERIES = re.compile(
    rb"^vllm:(num_requests_running|num_requests_waiting|kv_cache_usage_perc)(?:\{[^}\n]*\})? (\S+)",
    re.MULTILINE,
)
_CONFIG = re.compile(rb"^vllm:cache_config_info\{([^\n]*)\} ", re.MULTILINE)
_LABEL = re.compile(rb'(block_size|num_gpu_blocks)="(\d{1,15})"')


_MAX_OTHERS = 1e6


class Report(NamedTuple):
    """One look at `/metrics`."""

    num_calls: float
    """Running and waiting."""
    kv_usage: float
    """Share of its KV blocks in use, from 0 to 1; mean over its engines."""
    num_kv_tokens: int | None
    """That its KV cache holds, summed over its engines; None if it does not tell."""


def read_report(text: bytes) -> Report | None:
    """Read the series of a vLLM server; None if they are not there or make no sense."""
    totals: dict[bytes, float] = {}
    num_usages = 0
    for name, value in _SERIES.findall(text):
        try:
            number = float(value)
        except ValueError:
            return None
        if not 0.0 <= number < math.inf:
            return None
        totals[name] = totals.get(name, 0.0) + number
        num_usages += name == b"kv_cache_usage_perc"
    if len(totals) < 3:
        return None
    num_tokens = sum(_num_kv_tokens(labels) for labels in _CONFIG.findall(text))
    return Report(
        num_calls=totals[b"num_requests_running"] + totals[b"num_requests_waiting"],
        kv_usage=min(1.0, totals[b"kv_cache_usage_perc"] / num_usages),
        num_kv_tokens=num_tokens if num_tokens > 0 else None,
    )


def _num_kv_tokens(labels: bytes) -> int:
    """Return what one engine's KV cache holds; 0 if it does not tell."""
    values = {name: int(value) for name, value in _LABEL.findall(labels)}
    # vLLM keeps one block for itself.
    return max(0, values.get(b"block_size", 0) * (values.get(b"num_gpu_blocks", 0) - 1))


@dataclass(slots=True)
class Others:
    """What is on an instance beside this router's own calls, from its reports.

    A call may have been counted here and not there, or the other way round, when the instance
    was asked; what two reports in a row agree on is believed.
    """

    num_calls: int = 0
    kv_share: float = 0.0
    _last: tuple[float, float] = (0.0, 0.0)

    def take(self, report: Report, *, num_own_calls: int, own_kv_share: float) -> bool:
        """Take a report; returns whether what is believed has changed.

        Args:
            report: From the instance.
            num_own_calls: The most that this router had there while it was asked.
            own_kv_share: Of the KV cache, as far as these calls are known to fill it.
        """
        seen = (
            max(0.0, report.num_calls - num_own_calls),
            max(0.0, report.kv_usage - own_kv_share),
        )
        before = self.num_calls, self.kv_share
        self.num_calls = int(min(seen[0], self._last[0], _MAX_OTHERS))
        # Without calls of others nobody else holds blocks; the rest is what was guessed wrong.
        self.kv_share = min(seen[1], self._last[1]) if self.num_calls else 0.0
        self._last = seen
        return (self.num_calls, self.kv_share) != before

    def forget(self) -> bool:
        """Believe that nobody else is there: the instance says nothing any more."""
        changed = bool(self.num_calls or self.kv_share)
        self.num_calls, self.kv_share, self._last = 0, 0.0, (0.0, 0.0)
        return changed
