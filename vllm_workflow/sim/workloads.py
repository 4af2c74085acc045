"""The one door to runs: a file of any known format, or a generator by name."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import count, islice
from pathlib import Path

from vllm_workflow.core.errors import ConfigError
from vllm_workflow.sim import workload_chase, workload_mac, workload_reforce
from vllm_workflow.sim.rng import stream
from vllm_workflow.sim.trace import read_trace
from vllm_workflow.sim.types import PrefixPart, Trace, TraceRun
from vllm_workflow.sim.workload_chess import FLAT_REVISIONS, RECORDED_REVISIONS, Chess

PREFIX = "builtin:"
DEFAULT_NUM_RUNS = 100

Generator = Callable[[int, int], TraceRun]
"""(index of the run, seed) -> run."""

_BUILTIN: Mapping[str, tuple[Generator, str]] = {
    "chess": (
        Chess(workflow="chess", revisions=RECORDED_REVISIONS).run,
        "CHESS on BIRD, revisions as recorded",
    ),
    "chess-flat": (
        Chess(workflow="chess-flat", revisions=FLAT_REVISIONS).run,
        "CHESS with 0 to 10 revisions, all equally likely, as in the published traces",
    ),
    "mac": (workload_mac.run, "MAC-SQL, a chain with a short repair loop"),
    "chase": (workload_chase.run, "CHASE-SQL, 21 candidates side by side and a tournament"),
    "reforce": (workload_reforce.run, "ReFoRCE, dialogues that grow with every turn"),
}


def builtin_names() -> list[str]:
    """Names of the generators, each with `builtin:` before it."""
    return [PREFIX + name for name in _BUILTIN]


def load(name_or_path: str | Path, num_runs: int | None = None, seed: int = 0) -> Trace:
    """Return runs from a file or a generator.

    The first n of N runs are the same for every N. A file with fewer runs than asked for is
    repeated in shuffled passes, each run as often as any other (give or take one), with ids
    of their own and without arrivals; the notes say so.

    Args:
        name_or_path: `builtin:NAME`, or a file that `read_trace` reads.
        num_runs: How many; None for all of a file, `DEFAULT_NUM_RUNS` of a generator.
        seed: Of a generator, or of the passes.

    Raises:
        ConfigError: Unknown name, a number below 1, or the file cannot be read.
    """
    if num_runs is not None and num_runs < 1:
        raise ConfigError(f"number of runs: expected at least 1, got {num_runs}")
    name = str(name_or_path)
    if name.startswith(PREFIX):
        return _generated(name, DEFAULT_NUM_RUNS if num_runs is None else num_runs, seed)
    trace = read_trace(name_or_path)
    if num_runs is None or num_runs == len(trace.runs):
        return trace
    if num_runs < len(trace.runs):
        note = f"The first {num_runs} of {len(trace.runs)} runs."
        return replace(trace, runs=trace.runs[:num_runs], notes=(*trace.notes, note))
    return _resampled(trace, num_runs, seed)


def _generated(name: str, num_runs: int, seed: int) -> Trace:
    found = _BUILTIN.get(name.removeprefix(PREFIX))
    if found is None:
        raise ConfigError(f"workload: expected a file or one of {builtin_names()}, got {name!r}")
    generator, text = found
    return Trace(
        runs=tuple(generator(i, seed) for i in range(num_runs)),
        source=name,
        notes=(f"Generated: {text}; seed {seed}.",),
    )


def _resampled(trace: Trace, num_runs: int, seed: int) -> Trace:
    own = _own_parts(trace.runs)
    names = {run.run_id for run in trace.runs}
    rng = stream(seed, "resample")
    runs = [replace(run, arrival_s=None) for run in trace.runs]
    for position, copy in islice(_passes(len(trace.runs), rng), num_runs - len(trace.runs)):
        run = trace.runs[position]
        run_id = _free(f"{run.run_id}~{copy}", names)
        runs.append(_renamed(run, run_id, own))
    note = (
        f"{len(trace.runs)} runs were resampled to {num_runs}; each copy has prefix parts of "
        "its own where no other run of the file had them, and no arrival."
    )
    return Trace(runs=tuple(runs), source=trace.source, notes=(*trace.notes, note))


def _passes(num_items: int, rng: random.Random) -> Iterator[tuple[int, int]]:
    """Yield positions in shuffled passes, each with the number of the pass from 2."""
    for number in count(2):
        positions = list(range(num_items))
        rng.shuffle(positions)
        for position in positions:
            yield position, number


def _own_parts(runs: Sequence[TraceRun]) -> Collection[str]:
    """Ids of the parts that one run alone has; of a single run, those that bear its name."""
    users = Counter(
        part_id
        for run in runs
        for part_id in {part.part_id for call in run.calls for part in call.prefix}
    )
    if len(runs) == 1:
        return {part_id for part_id in users if part_id.startswith(f"{runs[0].run_id}/")}
    return {part_id for part_id, num_runs in users.items() if num_runs == 1}


def _free(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "~"
    taken.add(name)
    return name


def _renamed(run: TraceRun, run_id: str, own: Collection[str]) -> TraceRun:
    def fresh(part: PrefixPart) -> PrefixPart:
        if part.part_id not in own:
            return part
        local = part.part_id.removeprefix(f"{run.run_id}/")
        return replace(part, part_id=f"{run_id}/{local}")

    calls = tuple(
        replace(call, prefix=tuple(fresh(part) for part in call.prefix)) for call in run.calls
    )
    return replace(run, run_id=run_id, calls=calls, arrival_s=None)
