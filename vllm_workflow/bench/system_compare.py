"""A comparison at level 3, with level 2 on the same runs and arrivals beside it."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vllm_workflow.bench import system
from vllm_workflow.bench.compare import (
    DEFAULT_AGAINST,
    Comparison,
    Options,
    Progress,
    column_mean,
    compare,
    same_setting,
)
from vllm_workflow.bench.compare_jobs import Job, Setting, Variant
from vllm_workflow.bench.compare_policies import Entry, by_p95, is_baseline
from vllm_workflow.bench.compare_rows import PAIRED_METRICS, Row, pair, row_of
from vllm_workflow.bench.system import SystemOptions, SystemRun
from vllm_workflow.bench.system_router import System, systems
from vllm_workflow.core.config import PolicyConfig
from vllm_workflow.core.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class SystemComparison:
    """What came of it."""

    shown: Comparison
    """Level 3: valid measurements of the systems that have one in every setting."""
    below: Comparison
    """Level 2, and level 1 below it, of this project's policies."""
    systems: tuple[System, ...]
    runs: tuple[SystemRun, ...]
    rows: tuple[Row, ...]
    """One per run, in their order, valid or not."""
    options: SystemOptions
    machine: Mapping[str, str]

    @property
    def num_invalid(self) -> int:
        return sum(not run.is_valid for run in self.runs)


def compare_systems(
    options: Options, system_options: SystemOptions, progress: Progress | None = None
) -> SystemComparison:
    """Run all systems in all settings, at level 2 and then for real.

    Raises:
        ConfigError: Unknown names, runs that do not fit the fleet, a fleet without emulation.
    """
    found = systems(options.policies)
    _check_against(options.against, found)
    own = tuple(each.name for each in found if each.policy is not None)
    below = compare(
        replace(options, level=2, policies=own or (DEFAULT_AGAINST,), against=None), progress
    )
    load_before = os.getloadavg()
    runs = _run(found, below.settings, options, system_options, progress)
    rows = tuple(_row(run, options) for run in runs)
    return SystemComparison(
        shown=_shown(below, found, runs, rows, options),
        below=below,
        systems=found,
        runs=tuple(runs),
        rows=rows,
        options=system_options,
        machine=_machine(load_before),
    )


def _check_against(against: str | None, found: Sequence[System]) -> None:
    names = [each.name for each in found]
    if against is not None and against not in names:
        raise ConfigError(f"--against: expected one of the policies {names}, got {against!r}")


def _run(
    found: Sequence[System],
    settings: Sequence[Setting],
    options: Options,
    system_options: SystemOptions,
    progress: Progress | None,
) -> list[SystemRun]:
    if progress is None:
        return system.run(found, settings, options.setup, options.num_seeds, system_options)
    progress.total = (progress.total or 0) + len(found) * len(settings) * options.num_seeds
    return system.run(
        found,
        settings,
        options.setup,
        options.num_seeds,
        system_options,
        told=lambda text: progress.set_description(f"level 3, {text}"),
        done=progress.update,
    )


def _row(run: SystemRun, options: Options) -> Row:
    """Return the columns of `row_of`, and what speaks against them."""
    said = {
        "valid": run.is_valid,
        "reasons": list(run.reasons),
        "problem": run.problem or None,
        "late_share": _late_share(run),
        "fingerprint": run.system.fingerprint,
    }
    setting = run.setting
    if run.sample is None:
        return {
            "policy": run.system.name,
            "trace": setting.trace,
            "rate": setting.rate,
            "load": setting.load,
            "slo_scale": setting.slo_scale,
            "seed": run.seed,
            "level": 3,
            **said,
        }
    # A peer has no policy of ours; nothing that a row shows depends on the stand-in.
    variant = Variant(policy=run.system.policy or PolicyConfig())
    job = Job(setup=options.setup, setting=setting, variant=variant, seed=run.seed, level=3)
    return {**row_of(run.system.name, job, run.sample), **said}


def _late_share(run: SystemRun) -> float | None:
    """Of the server that was furthest behind; None where none ran."""
    shares = [each["late_share"] for each in run.figures.get("emulated_servers", {}).values()]
    return max((share for share in shares if math.isfinite(share)), default=None)


def _shown(
    below: Comparison,
    found: Sequence[System],
    runs: Sequence[SystemRun],
    rows: Sequence[Row],
    options: Options,
) -> Comparison:
    """Return the valid part as a comparison like any other."""
    samples = {
        (each.name, setting): tuple(
            run.sample
            for run in runs
            if run.system == each and run.setting == setting and run.is_valid
            if run.sample is not None
        )
        for each in found
        for setting in below.settings
    }
    names = [n.name for n in found if all(samples[n.name, s] for s in below.settings)]
    valid = tuple(row for row in rows if row["valid"] and row["policy"] in names)
    by_name = {each.name: each for each in found}
    entries = tuple(
        Entry(
            name=name,
            variants=(Variant(policy=by_name[name].policy or PolicyConfig()),),
            score=by_p95,
        )
        for name in names
    )
    return Comparison(
        options=replace(options, level=3),
        entries=entries,
        settings=below.settings,
        samples={key: value for key, value in samples.items() if key[0] in names},
        chosen={},
        rows=valid,
        pairs=tuple(_pairs(valid, below.settings, by_name, options.against)),
        capacities=below.capacities,
        traces=below.traces,
    )


def _pairs(
    rows: Sequence[Row],
    settings: Sequence[Setting],
    by_name: Mapping[str, System],
    against: str | None,
) -> Iterable[Row]:
    """Pairs over the seeds that are valid on both sides."""
    for setting in settings:
        by_policy: dict[str, list[Row]] = {}
        for row in rows:
            if same_setting(row, setting):
                by_policy.setdefault(row["policy"], []).append(row)
        for other in _others(by_policy, by_name, against):
            for name, of_it in by_policy.items():
                seeds = {row["seed"] for row in of_it} & {r["seed"] for r in by_policy[other]}
                if name == other or not seeds:
                    continue
                sides = (
                    [row for row in side if row["seed"] in seeds]
                    for side in (of_it, by_policy[other])
                )
                mine, theirs = sides
                for metric in PAIRED_METRICS:
                    yield pair(mine, theirs, metric)


def _others(
    by_policy: Mapping[str, Sequence[Row]], by_name: Mapping[str, System], against: str | None
) -> list[str]:
    """Whom the others are held against: who was named, or the simple policy and the best peer."""
    if against is not None:
        return [against] if against in by_policy else []
    peers = [n for n in by_policy if by_name[n].peer is not None or is_baseline(n)]
    best = min(
        peers,
        key=lambda n: (
            -column_mean(by_policy[n], "attainment"),
            column_mean(by_policy[n], "p95_s"),
        ),
        default=None,
    )
    named = [DEFAULT_AGAINST] if DEFAULT_AGAINST in by_policy else []
    return list(dict.fromkeys([*named, *([best] if best else [])]))


def level_errors(comparison: SystemComparison) -> list[Row]:
    """Return level 2 against level 3 per policy and setting, over the seeds that are valid.

    `error` is that of the mean over seeds; a share. Peers have no level 2.
    """
    found = []
    for setting in comparison.shown.settings:
        for entry in comparison.shown.entries:
            theirs = {r["seed"]: r for r in comparison.below.rows_of(setting, entry.name)}
            pairs = [
                (theirs[row["seed"]], row)
                for row in comparison.shown.rows_of(setting, entry.name)
                if row["seed"] in theirs
            ]
            found += [_level_error(entry.name, setting, pairs)] if pairs else []
    return found


def _level_error(name: str, setting: Setting, pairs: Sequence[tuple[Row, Row]]) -> Row:
    error: Row = {
        "policy": name,
        "trace": setting.trace,
        "rate": setting.rate,
        "load": setting.load,
        "slo_scale": setting.slo_scale,
        "seeds": len(pairs),
    }
    for metric in ("p95_s", "mean_s", "attainment"):
        two, three = (statistics.fmean(each[metric] for each in side) for side in zip(*pairs))
        error[f"{metric}_level_2"] = two
        error[metric] = three
        is_ratio = metric != "attainment" and math.isfinite(two) and math.isfinite(three)
        error[f"{metric}_error"] = two / three - 1.0 if is_ratio else two - three
    return error


def level_error_summary(comparison: SystemComparison) -> Row:
    """Return `level_errors` in a few numbers."""
    errors = level_errors(comparison)
    known = [e["p95_s_error"] for e in errors if math.isfinite(e["p95_s_error"])]
    absolute = [abs(error) for error in known]
    return {
        "what": "P95 run latency at level 2 against level 3, same runs and arrivals",
        "median_abs": statistics.median(absolute) if absolute else None,
        "mean_abs": statistics.fmean(absolute) if absolute else None,
        "worst_abs": max(absolute, default=None),
        "mean_signed": statistics.fmean(known) if known else None,
        "settings": errors,
    }


def _machine(load_before: tuple[float, float, float]) -> dict[str, str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    models = {line.partition(":")[2].strip() for line in text.splitlines() if "model name" in line}
    return {
        "cpus": f"{os.cpu_count()} x {', '.join(sorted(models)) or 'unknown'}",
        "load_average_before": f"{load_before[0]:.1f}",
        "load_average_after": f"{os.getloadavg()[0]:.1f}",
    }
