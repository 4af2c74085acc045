"""What a run still has to do after one of its stages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from vllm_workflow.core.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class StageProfile:
    """One stage of a workflow as its author declares it, means over runs."""

    name: str
    rounds: float = 1.0
    """How often the stage is entered, one after the other; 0.3 if three runs in ten do."""
    prompt_tokens: int = 256
    output_tokens: float = 64.0

    def __post_init__(self) -> None:
        for name in ("rounds", "prompt_tokens", "output_tokens"):
            value = getattr(self, name)
            if not 0 <= value <= 1e9:
                raise ConfigError(f"stage {self.name!r}: {name}: expected 0 to 1e9, got {value!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkflowProfile:
    """The stages of a workflow in the order in which they start.

    Calls of one round run side by side, so a round lasts as long as one call.
    """

    name: str
    stages: tuple[StageProfile, ...]

    _after: Mapping[str, tuple[StageProfile, ...]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        names = [s.name for s in self.stages]
        if len(set(names)) != len(names):
            raise ConfigError(f"workflow {self.name!r}: a stage is declared twice: {names}")
        after = {
            stage.name: (*_further_rounds(stage), *self.stages[i + 1 :])
            for i, stage in enumerate(self.stages)
        }
        object.__setattr__(self, "_after", MappingProxyType(after))

    def has(self, stage: str) -> bool:
        return stage in self._after

    def after(self, stage: str) -> tuple[StageProfile, ...]:
        """What follows one call of `stage`; nothing is known of an undeclared one: empty.

        Which of several rounds a call belongs to is not known, so of the rounds beyond the
        first, half are still to come on average.
        """
        return self._after.get(stage, ())


def _further_rounds(stage: StageProfile) -> tuple[StageProfile, ...]:
    return (replace(stage, rounds=0.5 * (stage.rounds - 1.0)),) if stage.rounds > 1.0 else ()
