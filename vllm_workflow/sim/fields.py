"""Checked reading of JSON from trace files: errors name file, line, field, got and wanted."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from vllm_workflow.core.errors import ConfigError

MAX_TOKENS = 10_000_000
"""Longest prompt or answer taken for real; the largest context windows hold a tenth of it."""
MAX_TIME_S = 1e9
"""Longest time taken for real, thirty years: milliseconds read as seconds exceed it."""
MAX_NAME_CHARS = 512


@dataclass(frozen=True, slots=True)
class Place:
    """Where in a file something stands."""

    source: str
    line: int | None = None
    path: str = ""
    """Of the field from the line's outermost value, e.g. `calls[2].stage`."""

    def __truediv__(self, name: str) -> Place:
        return Place(self.source, self.line, f"{self.path}.{name}" if self.path else name)

    def __getitem__(self, index: int) -> Place:
        return Place(self.source, self.line, f"{self.path}[{index}]")

    def fail(self, wanted: str, got: object) -> NoReturn:
        """Raise a ConfigError that says what was wanted here and what was there."""
        raise ConfigError(f"{self}: expected {wanted}, got {_shown(got)}")

    def __str__(self) -> str:
        line = "" if self.line is None else f":{self.line}"
        return f"{self.source}{line}" + (f": {self.path}" if self.path else "")


def read_text(path: Path) -> str:
    """Return a file's text.

    Raises:
        ConfigError: It cannot be read, is not UTF-8, or holds nothing.
    """
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as e:
        reason = e.strerror if isinstance(e, OSError) else e
        raise ConfigError(f"{path}: cannot read the trace: {reason}") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = data.count(b"\n", 0, e.start) + 1
        raise ConfigError(
            f"{path}:{line}: expected UTF-8 text, got the byte {data[e.start]:#04x}"
        ) from None
    if not text.strip():
        raise ConfigError(f"{path}: expected at least one run, got an empty file")
    return text


def json_lines(text: str, source: str) -> Iterator[tuple[Place, Any]]:
    """Yield each line that is not blank, parsed, with its place."""
    # Not splitlines(): U+2028 and its kind may stand inside a JSON string.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            place = Place(source, number)
            yield place, parse(line, place)


def parse(text: str, place: Place) -> Any:
    """Parse JSON; `NaN` and `Infinity`, which Python would let pass, are errors."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError) as e:
        raise ConfigError(f"{place}: expected JSON, got {_shown(text.strip())}: {e}") from None


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def an_object(value: Any, place: Place) -> Mapping[str, Any]:
    """Return `value` if it is a JSON object."""
    if not isinstance(value, dict):
        place.fail("an object", value)
    return value


def a_list(value: Any, place: Place, *, of: str, empty: bool = True) -> list[Any]:
    """Return `value` if it is a list.

    Args:
        value: As parsed.
        place: Where it stands.
        of: What its items are, for the error.
        empty: Whether it may have no items.
    """
    if not isinstance(value, list) or (not value and not empty):
        place.fail(f"a list of {of}" if empty else f"a list of at least one {of}", value)
    return value


def known_keys(data: Mapping[str, Any], known: Collection[str], place: Place) -> None:
    """Raise a ConfigError if `data` has a field that nobody knows."""
    for key in data:
        if key not in known:
            raise ConfigError(f"{place}: unknown field {key!r:.80}; known fields: {sorted(known)}")


def required(data: Mapping[str, Any], name: str, place: Place) -> Any:
    """Return a field that must be there."""
    if name not in data:
        raise ConfigError(f"{place / name}: missing; the fields here are {sorted(data)}"[:400])
    return data[name]


def a_count(value: Any, place: Place, *, minimum: int = 1, maximum: int = MAX_TOKENS) -> int:
    """Return a whole number of tokens; 12.0 counts as 12, because some exporters write that."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
        place.fail(f"an integer from {minimum} to {maximum}", value)
    return value


def a_time(value: Any, place: Place, *, unit: str = "seconds", scale: float = 1.0) -> float:
    """Return a time in seconds, from 0.

    Args:
        value: As parsed.
        place: Where it stands.
        unit: That the file uses, for the error.
        scale: Seconds per such unit.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        place.fail(f"a number of {unit}", value)
    if not 0 <= value <= MAX_TIME_S / scale:
        place.fail(f"{unit} from 0 to {MAX_TIME_S / scale:g}", value)
    return value * scale


def a_name(value: Any, place: Place, *, empty: bool = False) -> str:
    """Return a name: text that can be printed in one line."""
    if not isinstance(value, str) or not (value or empty):
        place.fail("text" if empty else "text that is not empty", value)
    if len(value) > MAX_NAME_CHARS or any(ord(c) < 32 or 0xD800 <= ord(c) < 0xE000 for c in value):
        place.fail(f"at most {MAX_NAME_CHARS} characters of text without control characters", value)
    return value


def _shown(value: object) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return "a number beyond the range of floats"
    if isinstance(value, int) and abs(value) > 10**30:
        return "a number of more than 30 digits"
    text = f"{value!a}"
    return text if len(text) <= 80 else f"{text[:77]}…"
