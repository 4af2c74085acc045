"""How the router writes its log: lines for people, or JSON for programs."""

from __future__ import annotations

import logging
from typing import TextIO

from pythonjsonlogger.json import JsonFormatter

calls = logging.getLogger("vllm_workflow.calls")
"""One line per call, with what is known of it as fields; off unless `log_calls` is set."""
_TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class _Handler(logging.StreamHandler[TextIO]):
    """Writes to stderr; of a type that tells it from those of others."""


def configure(level: str, form: str, *, log_calls: bool) -> None:
    """Set up the log of this process, or change how it is.

    Args:
        level: Of all but calls.
        form: `text` or `json`: one object per line, with every field that a line carries.
        log_calls: Write a line for each call, whatever the level.
    """
    root = logging.getLogger()
    for old in [handler for handler in root.handlers if isinstance(handler, _Handler)]:
        root.removeHandler(old)
    handler = _Handler()
    if form == "json":
        handler.setFormatter(
            JsonFormatter(
                "%(asctime)s %(levelname)s %(name)s %(message)s",
                rename_fields={"asctime": "time", "levelname": "level", "name": "logger"},
            )
        )
    else:
        handler.setFormatter(logging.Formatter(_TEXT))
    root.addHandler(handler)
    root.setLevel(level.upper())
    calls.setLevel(logging.INFO if log_calls else logging.CRITICAL)
