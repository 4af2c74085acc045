"""How the router writes its log: lines for people, or JSON for programs."""

from __future__ import annotations

import logging

from pythonjsonlogger.json import JsonFormatter

calls = logging.getLogger("vllm_workflow.calls")
"""One line per call, with what is known of it as fields; off unless `log_calls` is set."""
_TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def configure(level: str, form: str, *, log_calls: bool) -> None:
    """Set up the log of this process.

    Args:
        level: Of all but calls.
        form: `text` or `json`: one object per line, with every field that a line carries.
        log_calls: Write a line for each call, whatever the level.
    """
    handler = logging.StreamHandler()
    if form == "json":
        handler.setFormatter(
            JsonFormatter(
                "%(asctime)s %(levelname)s %(name)s %(message)s",
                rename_fields={"asctime": "time", "levelname": "level", "name": "logger"},
            )
        )
    else:
        handler.setFormatter(logging.Formatter(_TEXT))
    logging.basicConfig(level=level.upper(), handlers=[handler])
    calls.setLevel(logging.INFO if log_calls else logging.CRITICAL)
