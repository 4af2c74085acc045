"""What a tuner leaves behind: `policy.json`, replaced whole, and a history that does not grow."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_workflow.core.config import PolicyConfig
from vllm_workflow.core.errors import ConfigError, because

MAX_HISTORY = 1000


def write_policy(path: Path, policy: PolicyConfig) -> None:
    """Write a `policy.json`: who reads it meanwhile sees the old one or the new one, whole.

    Raises:
        ConfigError: It cannot be written.
    """
    _replace(path, policy.to_json())


def append_history(path: Path, entry: Mapping[str, Any], *, max_entries: int = MAX_HISTORY) -> None:
    """Add a line to a history; the oldest beyond `max_entries` go.

    Raises:
        ConfigError: It cannot be read or written.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path}: cannot read the history: {because(e)}") from None
    lines.append(json.dumps(entry, allow_nan=False))
    _replace(path, "".join(f"{line}\n" for line in lines[-max_entries:]))


def _replace(path: Path, text: str) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as e:
        beside.unlink(missing_ok=True)
        raise ConfigError(f"{path}: cannot write: {e.strerror}") from None
