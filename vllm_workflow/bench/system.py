"""Level 3: systems measured as they run, on servers with emulated GPUs.

A fleet is started once for all systems whose servers are alike. Each measurement finds the
servers' prefix caches empty and a router that has just been started, as a simulation does. The
order of systems alternates with the seed.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from vllm_workflow.bench.compare_jobs import Inputs, Sample, Setting, Setup, inputs_of
from vllm_workflow.bench.records import RunRecord
from vllm_workflow.bench.replay import PlannedRun
from vllm_workflow.bench.results import to_json_value
from vllm_workflow.bench.serve import ServeOptions, ServeResult, serve
from vllm_workflow.bench.system_fleet import (
    EmulatedFleet,
    EmulatedInstance,
    emulated_instances,
)
from vllm_workflow.bench.system_router import System, front_process
from vllm_workflow.bench.system_words import WORDS
from vllm_workflow.cluster.process import ProcessError
from vllm_workflow.core.config import PolicyConfig
from vllm_workflow.core.errors import UpstreamError
from vllm_workflow.core.metrics import slo_attainment

DEFAULT_TIME_SCALE = 3.0
DEFAULT_WORKDIR = Path(".cache/system")
DEFAULT_PEERS = Path(".cache/peers")
MEASUREMENTS = "measurements.jsonl"
"""In the work directory: a line for each measurement, as they end."""
_FRONT_TIMEOUT_S = 60.0
_CALL_TIMEOUT_S = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SystemOptions:
    """How level 3 is run; a field is the flag of the same name."""

    time_scale: float = DEFAULT_TIME_SCALE
    """The emulated world runs so many times as fast as life: steps, arrivals, gaps and SLOs
    alike. Results are in seconds of life."""
    workdir: Path = DEFAULT_WORKDIR
    """For model folders, configurations and logs."""
    peers: Path = DEFAULT_PEERS
    """Where peers are installed, each in a virtual environment of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SystemRun:
    """One system on the runs and arrivals of one seed."""

    system: System
    setting: Setting
    seed: int
    sample: Sample | None
    """None if it could not be measured at all."""
    reasons: tuple[str, ...]
    """What speaks against the figures; none if they are valid."""
    problem: str = ""
    """Why the system does not work before these servers; empty if it does."""
    figures: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    """What the load generator and the servers said: validity, errors, calls per instance."""

    @property
    def is_valid(self) -> bool:
        return self.sample is not None and not self.reasons and not self.problem


Told = Callable[[str], None]
"""Is told what is being done, in a few words."""


async def measure_systems(
    systems: Sequence[System],
    settings: Sequence[Setting],
    setup: Setup,
    num_seeds: int,
    options: SystemOptions,
    *,
    told: Told = lambda text: None,
    done: Callable[[], object] = lambda: None,
) -> list[SystemRun]:
    """Measure all systems in all settings; return one value per system, setting and seed.

    Args:
        systems: What to measure.
        settings: Traces, rates and promises.
        setup: Fleet and number of runs.
        num_seeds: Seeds from 0.
        options: How.
        told: What is being done.
        done: Called after each measurement.

    Servers that do not start, or end, are a problem of all systems before them.

    Raises:
        ConfigError: A fleet that cannot be emulated.
    """
    instances = emulated_instances(setup)
    options.workdir.mkdir(parents=True, exist_ok=True)
    (options.workdir / MEASUREMENTS).write_text("", encoding="utf-8")
    found = []
    for policy, group in _by_engine_policy(systems).items():
        name = "stock" if policy is None else f"{policy.ordering}-{policy.fingerprint}"
        folder = (options.workdir / name).resolve()
        planned = _in_turn(group, settings, num_seeds)
        told(f"starting {len(instances)} {name} servers")
        fleet = EmulatedFleet(instances, policy, time_scale=options.time_scale, folder=folder)
        try:
            async with fleet:
                while planned:
                    system, setting, seed = planned[0]
                    told(system.name)
                    inputs = inputs_of(setup, setting, seed)
                    found.append(
                        await measure(system, fleet, setting, inputs, seed, options, folder)
                    )
                    del planned[0]
                    _note(found[-1], options.workdir / MEASUREMENTS)
                    done()
        except (ProcessError, UpstreamError) as e:
            # What has been measured already took too long to lose.
            found += [_not_measured(*each, problem=f"servers: {e}") for each in planned]
    return found


def _by_engine_policy(systems: Sequence[System]) -> dict[PolicyConfig | None, list[System]]:
    """Return the systems that the same servers serve together."""
    groups: dict[PolicyConfig | None, list[System]] = {}
    for system in systems:
        groups.setdefault(system.engine_policy, []).append(system)
    return groups


def _in_turn(
    group: Sequence[System], settings: Sequence[Setting], num_seeds: int
) -> list[_Planned]:
    """Return what is to be measured; every other seed begins with the last system."""
    return [
        _Planned(system, setting, seed)
        for setting in settings
        for seed in range(num_seeds)
        for system in (group if seed % 2 == 0 else reversed(group))
    ]


def _note(run: SystemRun, path: Path) -> None:
    """Append a measurement, for whoever does not want to wait, or has interrupted the rest."""
    latencies_s = () if run.sample is None else run.sample.latencies_s
    line = {
        "policy": run.system.name,
        "trace": run.setting.trace,
        "rate": run.setting.rate,
        "seed": run.seed,
        "attainment": run.sample and slo_attainment(latencies_s, run.sample.slos_s),
        "latencies_s": to_json_value(latencies_s),
        "reasons": run.reasons,
        "problem": run.problem,
    }
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


class _Planned(NamedTuple):
    system: System
    setting: Setting
    seed: int


def _not_measured(system: System, setting: Setting, seed: int, problem: str) -> SystemRun:
    return SystemRun(
        system=system, setting=setting, seed=seed, sample=None, reasons=(), problem=problem
    )


async def measure(
    system: System,
    fleet: EmulatedFleet,
    setting: Setting,
    inputs: Inputs,
    seed: int,
    options: SystemOptions,
    folder: Path,
) -> SystemRun:
    """Measure one system before running servers.

    Failed calls fail their runs, which miss their SLOs. A router that does not start, or that
    answers no call, is a problem of its own, not a figure.

    Raises:
        UpstreamError: The servers themselves do not answer.
    """
    await fleet.reset_prefix_caches()
    try:
        front = front_process(
            system, fleet, inputs.workflows, peers_folder=options.peers, folder=folder
        )
        try:
            await front.start()
            await front.ready("/health", (200,), _FRONT_TIMEOUT_S)
            began = time.monotonic()
            result = await serve(
                _serve_options(system, fleet, setting, inputs, seed, front.url), _planned(inputs)
            )
            wall_s = time.monotonic() - began
        finally:
            await front.stop()
    except (ProcessError, UpstreamError) as e:
        return _not_measured(system, setting, seed, problem=str(e))
    found = SystemRun(system=system, setting=setting, seed=seed, sample=None, reasons=())
    return _judged(found, result, {"wall_s": wall_s, "server_version": fleet.version})


def _judged(found: SystemRun, result: ServeResult, said: Mapping[str, Any]) -> SystemRun:
    figures = {
        **said,
        "generator": dict(result.validity.generator),
        "emulated_servers": {k: dict(v) for k, v in result.validity.emulated_servers.items()},
        **{
            name: result.figures[name]
            for name in ("calls_completed", "calls_failed", "total_input_tokens", "errors")
        },
        "total_cached_tokens": result.figures["total_cached_tokens"],
        "per_instance": result.figures["per_instance"],
    }
    if not result.figures["calls_completed"]:
        first = next(iter(result.figures["errors"]), "no call was made")
        return replace(found, problem=f"answered no call: {first}", figures=figures)
    return replace(
        found,
        sample=sample_of(result.runs),
        reasons=result.validity.reasons,
        figures=figures,
    )


def sample_of(runs: Sequence[RunRecord]) -> Sample:
    """Return what became of runs, in order of arrival, in seconds of life."""
    ordered = sorted(runs, key=lambda run: run.arrival_s)
    return Sample(
        arrivals=tuple(run.arrival_s for run in ordered),
        latencies_s=tuple(run.latency_s for run in ordered),
        references_s=tuple(run.reference_s or math.nan for run in ordered),
        slos_s=tuple(math.inf if run.slo_s is None else run.slo_s for run in ordered),
        decision_us=None,
    )


def _planned(inputs: Inputs) -> list[PlannedRun]:
    return [
        PlannedRun(run=replace(run, arrival_s=arrival), reference_s=reference_s)
        for run, arrival, reference_s in zip(
            inputs.runs, inputs.arrivals, inputs.references_s, strict=True
        )
    ]


def _serve_options(
    system: System,
    fleet: EmulatedFleet,
    setting: Setting,
    inputs: Inputs,
    seed: int,
    url: str,
) -> ServeOptions:
    longest = max(call.num_output_tokens for run in inputs.runs for call in run.calls)
    return ServeOptions(
        base_url=url,
        model=fleet.instances[0].spec.model_shape,
        # The same names every time, so that what hashes them decides alike; others per system,
        # so that nothing of one is ever in a cache of another.
        request_id_prefix=f"{system.name}-{setting.rate:.6g}-{seed}-",
        identity=system.identity,
        output_length="hidden",
        max_tokens=max(1, longest),
        words=WORDS,
        time_scale=fleet.time_scale,
        call_timeout_s=_CALL_TIMEOUT_S,
        emulated_servers=tuple(fleet.urls),
        disable_tqdm=True,
    )


def run(
    systems: Sequence[System],
    settings: Sequence[Setting],
    setup: Setup,
    num_seeds: int,
    options: SystemOptions,
    *,
    told: Told = lambda text: None,
    done: Callable[[], object] = lambda: None,
) -> list[SystemRun]:
    """Run `measure_systems` to its end."""
    try:
        import uvloop
    except ImportError:
        factory = None
    else:
        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(
            measure_systems(systems, settings, setup, num_seeds, options, told=told, done=done)
        )


def max_model_lens(instances: Sequence[EmulatedInstance]) -> dict[str, int]:
    """Return the longest context of each instance, for reports."""
    return {each.instance_id: each.max_model_len for each in instances}
