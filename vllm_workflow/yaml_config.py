"""Configuration in YAML: read, checked against a model, and told what is wrong with it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vllm_workflow.core.errors import ConfigError

_Model = TypeVar("_Model", bound=BaseModel)
Name = Annotated[str, Field(pattern=r"^[!-~]([ -~]{0,254}[!-~])?$")]
"""Printable ASCII: it travels in headers and labels."""
_SECRET = re.compile(r"auth|admin|key")
"""What stands in or below a field of such a name is not repeated in an error."""
_IN_URL = re.compile(r"//[^/@]*@")


class Strict(BaseModel):
    """Base of every section: unknown fields are errors, and nothing is converted."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def read_yaml(path: Path) -> object:
    """Return what a file holds.

    Raises:
        ConfigError: It cannot be read, or is not YAML.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path}: cannot read: {e}") from None
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as e:
        where = getattr(e, "problem_mark", None)
        # The error's own text quotes the file, which may hold a secret by mistake.
        at = f" in line {where.line + 1}, column {where.column + 1}" if where else ""
        problem = getattr(e, "problem", None) or type(e).__name__
        raise ConfigError(f"{path}: not YAML: {problem}{at}") from None
    except RecursionError:
        raise ConfigError(f"{path}: not YAML: nested too deeply") from None
    except (ValueError, TypeError, AttributeError, OverflowError) as e:
        # PyYAML's own, on what begins like a date or a number and is none.
        raise ConfigError(f"{path}: not YAML: a value cannot be read: {e!s:.80}") from None


def validated(model: type[_Model], data: object, *, source: str) -> _Model:
    """Check data against a model.

    Args:
        model: The sections and fields that may be there.
        data: What YAML gave.
        source: Where it came from, for error texts.

    Raises:
        ConfigError: With the path to each field that does not fit.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"{source}: expected a mapping of fields, got {data!r:.80}")
    try:
        return model.model_validate(dict(data))
    except ValidationError as e:
        lines = (f"{source}: {_describe(x)}" for x in e.errors())
        raise ConfigError("\n".join(lines)) from None
    except ConfigError as e:
        raise ConfigError(f"{source}: {e}") from None


def _describe(error: Any) -> str:
    """Say where, what was wanted and what was there."""
    where = ".".join(str(part) for part in error["loc"])
    text = error["msg"].removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        text = "unknown field"
    elif (
        error["type"] != "missing"
        and not isinstance(error["input"], Mapping | BaseModel)
        and not any(_SECRET.search(str(part)) for part in error["loc"])
    ):
        got = _IN_URL.sub("//…@", repr(error["input"]))
        text = f"{text}, got {got:.80}"
    return f"{where}: {text}" if where else text
