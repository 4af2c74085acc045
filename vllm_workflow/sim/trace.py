"""Runs in a file, whatever format it has."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

from vllm_workflow.router.store import StoreReader, is_store
from vllm_workflow.sim.fields import Place, json_lines, parse, read_text
from vllm_workflow.sim.trace_decisions import is_decision_log, read_decision_log
from vllm_workflow.sim.trace_import import is_hexgen, is_mooncake, read_hexgen, read_mooncake
from vllm_workflow.sim.trace_jsonl import is_jsonl, read_jsonl, write_trace
from vllm_workflow.sim.types import Trace

__all__ = ["read_trace", "write_trace"]

_FORMATS = (
    "this project's JSONL (run_id, workflow, calls), Hexgen (a list of Text2SQLRequest), "
    "Mooncake JSONL (timestamp, input_length, output_length) and a router's decision log (event)"
)


def read_trace(path: Path | str) -> Trace:
    """Read a file of runs; its first value tells which of the formats it has.

    Args:
        path: This project's JSONL, a Hexgen file, Mooncake JSONL, or a router's decision log, in
            its `store` too.

    Raises:
        ConfigError: It cannot be read or does not fit: with file, line, field, what was there
            and what was wanted.
    """
    path = Path(path)
    source = str(path)
    if is_store(path):
        with StoreReader(path) as reader:
            return read_decision_log("\n".join(reader.events()), source)
    text = read_text(path)
    if text.lstrip().startswith("["):
        value = parse(text, Place(source))
        if is_hexgen(value):
            return read_hexgen(value, source)
        _unknown(Place(source), value)
    place, first = next(json_lines(text, source))
    if isinstance(first, dict):
        if is_decision_log(first):
            return read_decision_log(text, source)
        if is_jsonl(first):
            return read_jsonl(text, source)
        if is_mooncake(first):
            return read_mooncake(text, source)
    _unknown(place, first)


def _unknown(place: Place, value: Any) -> NoReturn:
    place.fail(f"one of the formats {_FORMATS}", value)
