"""What somebody knows of calls beforehand, for studies of what knowing it is worth."""

from __future__ import annotations

import math
from collections.abc import Callable

from vllm_workflow.core.errors import ConfigError
from vllm_workflow.sim.rng import stream
from vllm_workflow.sim.types import TraceCall, TraceRun

LengthHint = Callable[[TraceRun, TraceCall], float]
"""Output tokens that a client announces for a call, right or wrong."""
RestHint = Callable[[TraceRun, TraceCall], float]
"""Seconds of the run's work after a call, in the place of what its profile says."""


def true_lengths(run: TraceRun, call: TraceCall) -> float:
    """Announce what will be: the oracle that no client has."""
    return float(call.num_output_tokens)


def noisy_lengths(sigma: float, seed: int = 0) -> LengthHint:
    """Announce the true length times a log-normal factor of median 1.

    A call gets the same factor whatever else is simulated, so that policies are compared on
    the same errors; twice the `sigma` doubles each factor's logarithm.

    Args:
        sigma: Standard deviation of the factor's logarithm, from 0; 0.5 is a factor of 1.65.
        seed: Of the errors.

    Raises:
        ConfigError: A `sigma` out of range.
    """
    if not 0.0 <= sigma < math.inf:
        raise ConfigError(f"sigma: expected a number from 0, got {sigma!r}")

    def hint(run: TraceRun, call: TraceCall) -> float:
        normal = stream(seed, "length hint", run.run_id, call.call_id).gauss(0.0, 1.0)
        return call.num_output_tokens * math.exp(sigma * normal)

    return hint
