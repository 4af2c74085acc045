"""What the router is wrong about in a comparison: to see which policies bear it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from vllm_workflow.core.errors import ConfigError
from vllm_workflow.core.workflow import StageProfile, WorkflowProfile
from vllm_workflow.sim.fleet import SimInstance
from vllm_workflow.sim.hints import LengthHint
from vllm_workflow.sim.rng import stream
from vllm_workflow.sim.scaling import scaled_latency
from vllm_workflow.sim.types import TraceCall, TraceRun

_KINDS = "none, cold, lengths:SHARE, profiles:SHARE, slow:INSTANCE:FACTOR"


@dataclass(frozen=True, slots=True, kw_only=True)
class Disturbance:
    """One thing, or nothing, that is not as the router believes."""

    name: str = "none"
    """As given, see `parse`."""
    cold: bool = False
    """No workflow is declared."""
    length_error: float | None = None
    """Share by which clients announce each call's output tokens too high or too low."""
    profile_error: float | None = None
    """Share by which all that is declared of a stage is too high or too low."""
    slow_instance: str = ""
    """The instance that takes `factor` times as long for each step as the router is told."""
    factor: float = 1.0

    def fleet(self, fleet: Sequence[SimInstance]) -> tuple[SimInstance, ...]:
        """Return a fleet that is not as configured.

        Raises:
            ConfigError: No such instance.
        """
        names = [each.instance.instance_id for each in fleet]
        if self.slow_instance and self.slow_instance not in names:
            raise ConfigError(f"--disturb {self.name}: expected one of {names}")
        return tuple(
            replace(each, actual=scaled_latency(each.latency, 1.0 / self.factor))
            if each.instance.instance_id == self.slow_instance
            else each
            for each in fleet
        )

    def workflows(self, declared: Sequence[WorkflowProfile]) -> tuple[WorkflowProfile, ...]:
        """Return what the router is told."""
        if self.cold:
            return ()
        if self.profile_error is None:
            return tuple(declared)
        return tuple(_wrong(profile, self.profile_error) for profile in declared)

    def hint(self, seed: int) -> LengthHint | None:
        """Return what clients announce of lengths; None: nothing.

        Args:
            seed: Of the errors; the same call gets the same error whatever the policy.
        """
        if self.length_error is None:
            return None
        error = self.length_error

        def announce(run: TraceRun, call: TraceCall) -> float:
            sign = _sign(seed, "announced length", run.run_id, call.call_id)
            return call.num_output_tokens * (1.0 + sign * error)

        return announce


UNDISTURBED = Disturbance()


def parse(text: str) -> Disturbance:
    """Read `none`, `cold`, `lengths:0.6`, `profiles:0.6` or `slow:a100-0:2`.

    Raises:
        ConfigError: Something else.
    """
    kind, *parts = text.split(":")
    match kind, parts:
        case "none", []:
            return Disturbance(name=text)
        case "cold", []:
            return Disturbance(name=text, cold=True)
        case "lengths", [share]:
            return Disturbance(name=text, length_error=_share(share, text))
        case "profiles", [share]:
            return Disturbance(name=text, profile_error=_share(share, text))
        case "slow", [instance, factor] if instance:
            return Disturbance(name=text, slow_instance=instance, factor=_factor(factor, text))
    raise ConfigError(f"--disturb: expected one of {_KINDS}, got {text!r}")


def _wrong(profile: WorkflowProfile, error: float) -> WorkflowProfile:
    return WorkflowProfile(
        name=profile.name,
        stages=tuple(_wrong_stage(profile.name, s, error) for s in profile.stages),
    )


def _wrong_stage(workflow: str, stage: StageProfile, error: float) -> StageProfile:
    def factor(of: str) -> float:
        return 1.0 + _sign(0, "declared", of, workflow, stage.name) * error

    return StageProfile(
        name=stage.name,
        rounds=stage.rounds * factor("rounds"),
        prompt_tokens=round(stage.prompt_tokens * factor("prompt_tokens")),
        output_tokens=stage.output_tokens * factor("output_tokens"),
    )


def _sign(seed: int, *names: str) -> int:
    return stream(seed, *names).choice((-1, 1))


def _share(text: str, whole: str) -> float:
    return _number(text, whole, "a share from 0 to below 1", 0.0, 0.999_999)


def _factor(text: str, whole: str) -> float:
    return _number(text, whole, "a factor from 0.01 to 100", 0.01, 100.0)


def _number(text: str, whole: str, wanted: str, least: float, most: float) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not least <= value <= most:
        raise ConfigError(f"--disturb {whole}: expected {wanted}, got {text!r}")
    return value
