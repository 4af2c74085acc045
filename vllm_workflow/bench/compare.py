"""Policies compared on the same runs and arrivals, setting by setting and seed by seed.

Everything is simulated at level 1 first, which is also how searches choose; at a higher level
what is chosen is measured again, and level 1 is held against it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from vllm_workflow.bench.compare_jobs import (
    Job,
    Sample,
    Setting,
    Setup,
    Variant,
    find_capacity,
    in_processes,
    level_of,
    run_job,
)
from vllm_workflow.bench.compare_policies import Entry, entries, is_baseline
from vllm_workflow.bench.compare_rows import PAIRED_METRICS, Row, pair, row_of
from vllm_workflow.core.errors import ConfigError
from vllm_workflow.core.metrics import mean
from vllm_workflow.sim.capacity import Capacity
from vllm_workflow.sim.types import Trace
from vllm_workflow.sim.workloads import load

DEFAULT_AGAINST = "least-outstanding+fcfs"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What to compare; a field is the flag of the same name."""

    traces: tuple[str, ...] = ("builtin:chess",)
    setup: Setup = field(
        default=Setup(
            fleet="A100:2,A6000:1,L40S:1",
            model_shape="llama-3.1-70b",
            weight_bits=4,
            tp=1,
            gpu_memory_utilization=0.95,
            num_runs=200,
            burstiness=1.0,
        )
    )
    rates: tuple[float, ...] = ()
    """Runs per second; if empty, `loads` say."""
    loads: tuple[float, ...] = (0.7, 0.85, 1.0)
    slo_scales: tuple[float, ...] = (5.0,)
    slo_s: float | None = None
    """In the place of `slo_scales`."""
    policies: tuple[str, ...] = ("workflow", "baselines")
    against: str | None = None
    num_seeds: int = 5
    level: int = 1
    num_jobs: int = 1


class Progress(Protocol):
    """What is told of how far it is; a `tqdm` bar is one."""

    total: float | None

    def set_description(self, desc: str) -> None: ...
    def update(self, n: float = 1) -> object: ...
    def refresh(self) -> object: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What came of it."""

    options: Options
    entries: tuple[Entry, ...]
    settings: tuple[Setting, ...]
    samples: Mapping[tuple[str, Setting], tuple[Sample, ...]]
    """(policy, setting) -> one per seed."""
    chosen: Mapping[tuple[str, Setting], Variant]
    rows: tuple[Row, ...]
    pairs: tuple[Row, ...]
    capacities: Mapping[str, Capacity]
    """Of each trace, where loads were asked for."""
    traces: Mapping[str, Trace]
    """As of the first seed."""
    rows_below: tuple[Row, ...] = ()
    """The same at level 1, where `rows` are of a higher one."""

    def rows_of(self, setting: Setting, policy: str | None = None) -> list[Row]:
        """Rows of one setting, of one policy or all."""
        return [
            row
            for row in self.rows
            if same_setting(row, setting) and policy in {None, row["policy"]}
        ]


def same_setting(row: Row, setting: Setting) -> bool:
    found = row["trace"], row["rate"], row["slo_scale"]
    return found == (setting.trace, setting.rate, setting.slo_scale)


def compare(options: Options, progress: Progress | None = None) -> Comparison:
    """Run all policies in all settings.

    Raises:
        ConfigError: Unknown names, unreadable files, a level that is not available, runs that do
            not fit the fleet.
    """
    found = tuple(entries(options.policies))
    level_of(options.level)
    _check_against(options.against, found)
    options.setup.build_fleet()
    traces = {name: load(name, options.setup.num_runs, 0) for name in options.traces}
    capacities = _capacities(options, progress)
    settings = tuple(_settings(options, capacities))
    below = _run(_jobs(options, settings, found), options, progress)
    chosen = _chosen(below, settings, found, options)
    rows_below = _rows(below, settings, found, chosen, options, 1)
    results, rows = below, rows_below
    if options.level > 1:
        results = _run(_chosen_jobs(options, settings, found, chosen), options, progress)
        rows = _rows(results, settings, found, chosen, options, options.level)
    samples = {
        (entry.name, setting): tuple(
            results[_job(options, setting, chosen[entry.name, setting], seed, options.level)]
            for seed in range(options.num_seeds)
        )
        for setting in settings
        for entry in found
    }
    return Comparison(
        options=options,
        entries=found,
        settings=settings,
        samples=samples,
        chosen=chosen,
        rows=tuple(rows),
        pairs=tuple(_pairs(rows, settings, found, options.against)),
        capacities=capacities,
        traces=traces,
        rows_below=tuple(rows_below) if options.level > 1 else (),
    )


def _check_against(against: str | None, found: Sequence[Entry]) -> None:
    names = [entry.name for entry in found]
    if against is not None and against not in names:
        raise ConfigError(f"--against: expected one of the policies {names}, got {against!r}")


def _capacities(options: Options, progress: Progress | None) -> dict[str, Capacity]:
    if options.rates:
        return {}
    tasks = [(options.setup, name) for name in options.traces]
    results = _with_progress(_find_capacity, tasks, options, progress, "capacity")
    return {name: results[options.setup, name] for name in options.traces}


def _find_capacity(task: tuple[Setup, str]) -> Capacity:
    return find_capacity(*task)


def _settings(options: Options, capacities: Mapping[str, Capacity]) -> Iterable[Setting]:
    scales: Sequence[float | None] = (None,) if options.slo_s is not None else options.slo_scales
    for trace in options.traces:
        asked: list[tuple[float, float | None]] = [(rate, None) for rate in options.rates]
        if not asked:
            asked = [(share * capacities[trace].rate, share) for share in options.loads]
        for rate, share in asked:
            for scale in scales:
                yield Setting(
                    trace=trace, rate=rate, load=share, slo_scale=scale, slo_s=options.slo_s
                )


def _job(options: Options, setting: Setting, variant: Variant, seed: int, level: int) -> Job:
    # The label names a variant and does not change what it does.
    variant = replace(variant, label="")
    return Job(setup=options.setup, setting=setting, variant=variant, seed=seed, level=level)


def _jobs(options: Options, settings: Sequence[Setting], found: Sequence[Entry]) -> list[Job]:
    jobs = (
        _job(options, setting, variant, seed, 1)
        for setting in settings
        for seed in range(options.num_seeds)
        for entry in found
        for variant in entry.variants
    )
    return list(dict.fromkeys(jobs))


def _chosen_jobs(
    options: Options,
    settings: Sequence[Setting],
    found: Sequence[Entry],
    chosen: Mapping[tuple[str, Setting], Variant],
) -> list[Job]:
    jobs = (
        _job(options, setting, chosen[entry.name, setting], seed, options.level)
        for setting in settings
        for seed in range(options.num_seeds)
        for entry in found
    )
    return list(dict.fromkeys(jobs))


def _run(jobs: Sequence[Job], options: Options, progress: Progress | None) -> dict[Job, Sample]:
    level = jobs[0].level if jobs else 1
    return _with_progress(run_job, jobs, options, progress, f"level {level}")


def _with_progress(
    do: Callable[[Any], Any],
    tasks: Sequence[Any],
    options: Options,
    progress: Progress | None,
    what: str,
) -> dict[Any, Any]:
    if progress is not None:
        progress.total = (progress.total or 0) + len(tasks)
        progress.set_description(what)
    results = {}
    for task, result in in_processes(do, tasks, options.num_jobs):
        results[task] = result
        if progress is not None:
            progress.update()
    return results


def _chosen(
    results: Mapping[Job, Sample],
    settings: Sequence[Setting],
    found: Sequence[Entry],
    options: Options,
) -> dict[tuple[str, Setting], Variant]:
    """Return for each search which of its variants is best; the first of equals."""

    def samples(setting: Setting, variant: Variant) -> list[Sample]:
        seeds = range(options.num_seeds)
        return [results[_job(options, setting, variant, seed, 1)] for seed in seeds]

    return {
        (entry.name, setting): entry.variants[0]
        if len(entry.variants) == 1
        else min(entry.variants, key=lambda v: entry.score(samples(setting, v)))
        for entry in found
        for setting in settings
    }


def _rows(
    results: Mapping[Job, Sample],
    settings: Sequence[Setting],
    found: Sequence[Entry],
    chosen: Mapping[tuple[str, Setting], Variant],
    options: Options,
    level: int,
) -> list[Row]:
    rows = []
    for setting in settings:
        for entry in found:
            variant = chosen[entry.name, setting]
            for seed in range(options.num_seeds):
                job = _job(options, setting, variant, seed, level)
                row = row_of(entry.name, job, results[job])
                rows.append({**row, "variant": variant.label or None})
    return rows


def _pairs(
    rows: Sequence[Row], settings: Sequence[Setting], found: Sequence[Entry], against: str | None
) -> Iterable[Row]:
    for setting in settings:
        by_policy: dict[str, list[Row]] = {entry.name: [] for entry in found}
        for row in rows:
            if same_setting(row, setting):
                by_policy[row["policy"]].append(row)
        for other in _others(by_policy, against):
            for name, of_it in by_policy.items():
                if name == other:
                    continue
                for metric in PAIRED_METRICS:
                    yield pair(of_it, by_policy[other], metric)


def _others(by_policy: Mapping[str, Sequence[Row]], against: str | None) -> list[str]:
    """Policies that the others are held against in one setting."""
    if against is not None:
        return [against]
    named = [DEFAULT_AGAINST] if DEFAULT_AGAINST in by_policy else []
    best = best_baseline(by_policy)
    return list(dict.fromkeys([*named, *([best] if best else [])]))


def best_baseline(by_policy: Mapping[str, Sequence[Row]]) -> str | None:
    """Return the baseline with most attainment, then least P95, means over seeds."""
    names = [name for name in by_policy if is_baseline(name)]
    if not names:
        return None

    def score(name: str) -> tuple[float, float]:
        return -column_mean(by_policy[name], "attainment"), column_mean(by_policy[name], "p95_s")

    return min(names, key=score)


def column_mean(rows: Sequence[Row], column: str) -> float:
    """Mean of a column over seeds; `inf` where a row has no number."""
    values = [row[column] for row in rows]
    if any(value is None for value in values):
        return math.inf
    return mean(values) or 0.0
