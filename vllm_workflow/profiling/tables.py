"""Timings in files: CSV with a header, or JSON lines."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from vllm_workflow.core.errors import ConfigError, because
from vllm_workflow.core.fit import Observation, StepLoad
from vllm_workflow.core.windows import RequestTiming

STEP_COLUMNS = ("step_ms", "num_prefill_tokens", "num_decode_seqs", "num_kv_tokens")
"""Of a table of engine steps; `prefill_attention` may come with them."""
REQUEST_COLUMNS = (
    "first_token_time",
    "last_token_time",
    "num_prompt_tokens",
    "num_output_tokens",
)
"""Of a table of requests; `num_cached_tokens` may come with them. Times in seconds."""

_T = TypeVar("_T")


def read_steps(path: Path) -> list[Observation]:
    """Read engine steps, one per row.

    Raises:
        ConfigError: With file, line, column, what was there and what was wanted.
    """
    return read_table(path, STEP_COLUMNS, _step, optional=("prefill_attention",))


def read_requests(path: Path) -> list[RequestTiming]:
    """Read requests, one per row.

    Raises:
        ConfigError: With file, line, column, what was there and what was wanted.
    """
    return read_table(path, REQUEST_COLUMNS, _request, optional=("num_cached_tokens",))


def read_table(
    path: Path,
    columns: Sequence[str],
    build: Callable[[Mapping[str, float]], _T],
    *,
    optional: Sequence[str] = (),
    least: Mapping[str, float] | None = None,
) -> list[_T]:
    """Read numbers from 0 out of each row, and make something of them.

    Args:
        path: CSV, or JSON lines if its name ends in `.jsonl`.
        columns: Wanted in every row; further ones are ignored.
        build: From column to number; may raise `ConfigError`.
        optional: 0 where missing.
        least: Smallest number accepted in a column, 0 by default.

    Raises:
        ConfigError: With file, line, column, what was there and what was wanted.
    """
    built = []
    for line, row in _rows(path):
        where = f"{path}, line {line}"
        numbers = {}
        for name in (*columns, *optional):
            if row.get(name) in (None, "") and name in optional:
                continue
            numbers[name] = _number(row, name, where, (least or {}).get(name, 0.0))
        try:
            built.append(build(numbers))
        except ConfigError as e:
            raise ConfigError(f"{where}: {e}") from None
    if not built:
        raise ConfigError(f"{path}: expected at least one row, got none")
    return built


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            if path.suffix == ".jsonl":
                for number, text in enumerate(file, start=1):
                    if text.strip():
                        yield number, _object(text, f"{path}, line {number}")
            else:
                reader = csv.DictReader(file)
                for row in reader:
                    yield reader.line_num, row
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise ConfigError(f"{path}: cannot read: {because(e)}") from None


def _object(text: str, where: str) -> Mapping[str, Any]:
    try:
        row = json.loads(text)
    except ValueError as e:
        raise ConfigError(f"{where}: not JSON: {e}") from None
    if not isinstance(row, dict):
        raise ConfigError(f"{where}: expected an object, got {row!r:.80}")
    return row


def _number(row: Mapping[str, Any], name: str, where: str, least: float) -> float:
    if name not in row:
        known = sorted(str(key) for key in row)
        raise ConfigError(f"{where}: column {name!r} is missing; there are {known}")
    value = row[name]
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not least <= number < math.inf:
        raise ConfigError(f"{where}: {name}: expected a number from {least:g}, got {value!r}")
    return number


def _step(row: Mapping[str, float]) -> Observation:
    load = StepLoad(
        num_prefill_tokens=row["num_prefill_tokens"],
        num_decode_seqs=row["num_decode_seqs"],
        num_kv_tokens=row["num_kv_tokens"],
        prefill_attention=row.get("prefill_attention", 0.0),
    )
    if row["step_ms"] <= 0.0:
        raise ConfigError(f"step_ms: expected a number above 0, got {row['step_ms']!r}")
    return Observation(seconds=row["step_ms"] / 1e3, loads=(load,))


def _request(row: Mapping[str, float]) -> RequestTiming:
    return RequestTiming(
        first_token_time=row["first_token_time"],
        last_token_time=row["last_token_time"],
        num_prompt_tokens=int(row["num_prompt_tokens"]),
        num_output_tokens=int(row["num_output_tokens"]),
        num_cached_tokens=int(row.get("num_cached_tokens", 0)),
    )
