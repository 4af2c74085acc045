"""Configuration in YAML: read, checked against a model, and told what is wrong with it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vllm_workflow.core.errors import ConfigError, because

_Model = TypeVar("_Model", bound=BaseModel)
Name = Annotated[str, Field(pattern=r"^[!-~]([ -~]{0,254}[!-~])?$")]
"""Printable ASCII: it travels in headers and labels."""
_SECRET = re.compile(r"auth|admin|key")
"""What stands in or below a field of such a name is not repeated in an error."""
_IN_URL = re.compile(r"//[^/@]*@")


class Strict(BaseModel):
    """Base of every section: unknown fields are errors, and nothing is converted."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class _Loader(yaml.SafeLoader):
    """Refuses a key that a mapping has twice: of two values one would be lost without a word."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        keys = set[str]()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in keys:
                    problem = "a key that was there already"
                    raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
                keys.add(key.value)
        return node


def read_yaml(path: Path) -> object:
    """Return what a file holds.

    Raises:
        ConfigError: It cannot be read, or is not YAML.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path}: cannot read: {because(e)}") from None
    try:
        return yaml.load(text, _Loader)
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
        lines = (f"{source}: {_describe(x, model)}" for x in e.errors())
        raise ConfigError("\n".join(lines)) from None
    except ConfigError as e:
        raise ConfigError(f"{source}: {e}") from None


_WANTED: Mapping[str, str] = {
    "bool_type": "true or false",
    "dict_type": "a mapping of fields",
    "float_type": "a number",
    "greater_than": "more than {gt:.15g}",
    "greater_than_equal": "at least {ge:.15g}",
    "int_type": "an integer",
    "less_than": "less than {lt:.15g}",
    "less_than_equal": "at most {le:.15g}",
    "list_type": "a list",
    "literal_error": "{expected}",
    "missing": "a value, got none",
    "model_type": "a mapping of fields",
    "string_pattern_mismatch": "a name that fits {pattern}",
    "string_type": "text",
    "too_short": "at least {min_length} of them",
}
"""What pydantic's kinds of errors want, with what it says of them."""


def _describe(error: Any, model: type[BaseModel]) -> str:
    """Say where, what was wanted and what was there."""
    where = ".".join(str(part) for part in error["loc"])
    text = error["msg"].removeprefix("Value error, ")
    if error["type"] in _WANTED:
        text = f"expected {_WANTED[error['type']].format(**error.get('ctx', {}))}"
    if error["type"] == "extra_forbidden":
        known = _known(model, error["loc"])
        text = f"unknown field; known fields are {known}" if known else "unknown field"
    elif (
        error["type"] != "missing"
        and not isinstance(error["input"], Mapping | BaseModel)
        and not any(_SECRET.search(str(part)) for part in error["loc"])
    ):
        got = _IN_URL.sub("//…@", repr(error["input"]))
        text = f"{text}, got {got:.80}"
    return f"{where}: {text}" if where else text


def _known(model: type[BaseModel], where: Sequence[str | int]) -> list[str]:
    """Return the fields of the section in which an unknown one stands.

    Args:
        model: The outermost section.
        where: Path to the unknown field.
    """
    for part in where[:-1]:
        if isinstance(part, str):
            field = model.model_fields.get(part)
            sections = list(_sections(field.annotation)) if field else []
            if len(sections) != 1:
                return []
            model = sections[0]
    return sorted(model.model_fields)


def _sections(kind: Any) -> Iterator[type[BaseModel]]:
    """Yield the models that a type is made of."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        yield kind
    for each in get_args(kind):
        yield from _sections(each)
