"""The `tuner` of `router.yaml`: whether, how often and on what the policy is tuned."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from vllm_workflow.core.config import PolicyConfig
from vllm_workflow.core.policy_grid import default_grid, points
from vllm_workflow.yaml_config import Strict


class TunerConfig(Strict):
    """Online tuning; without this section, or with `enabled: false`, there is no process of it."""

    enabled: bool = True
    interval_s: Annotated[float, Field(gt=0, le=1e6)] = 300.0
    """From the end of one tuning to the beginning of the next."""
    window_s: Annotated[float, Field(gt=0, le=1e6)] = 900.0
    """How far back the replayed traffic goes."""
    max_runs: Annotated[int, Field(ge=1, le=100_000)] = 200
    """Of the window, the last so many."""
    min_runs: Annotated[int, Field(ge=1, le=100_000)] = 30
    """Whole runs that there must be."""
    num_replicates: Annotated[int, Field(ge=3, le=1000)] = 6
    """Arrangements of the window that the best point is held against the present policy on."""
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    """That the gain is more than `min_gain`, one-sided."""
    min_gain: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Gain that a change must bring, in shares of runs on time."""
    p95_weight: Annotated[float, Field(ge=0, le=10)] = 0.1
    """Gain of a P95 that is e times shorter."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of the arrangements."""
    grid: dict[str, list[Any]] | None = None
    """Field of `policy.json` -> values to try, in all combinations; see `core.policy_grid`."""
    policy_file: Annotated[str, Field(min_length=1)] = "policy.json"
    """What was found; a change of it, by whomever, is taken over while calls run."""
    history_file: str | None = None
    """Every verdict, as JSON lines; the oldest beyond `max_history` go."""
    max_history: Annotated[int, Field(ge=1, le=10**6)] = 1000
    timeout_s: Annotated[float, Field(gt=0, le=1e5)] = 300.0
    """A tuning that takes longer is given up."""
    nice: Annotated[int, Field(ge=0, le=19)] = 19
    """Niceness of its process: 19 runs when nothing else wants to."""

    def settings(self) -> dict[str, Any]:
        """Return what `sim.tuner.TunerSettings` takes."""
        names = {"min_runs", "num_replicates", "confidence", "min_gain", "p95_weight", "seed"}
        return self.model_dump(include=names)

    def check(self, policy: PolicyConfig) -> None:
        """Raises: ConfigError: A grid that cannot be used."""
        points(policy, self.grid or default_grid(policy), source="tuner.grid")
