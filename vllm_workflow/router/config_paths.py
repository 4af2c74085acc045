"""Paths in configuration: relative to the folder of the file that they stand in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

INSTANCE_FILES: Mapping[str, Sequence[str]] = {
    "": ("profile", "api_key_file"),
    "tls": ("ca_file", "cert_file", "key_file"),
}
"""Fields of an instance that name files, by the section that they stand in."""


def locate(data: object, files: Mapping[str, Sequence[str]], folder: Path) -> None:
    """Put a folder before each relative path.

    Args:
        data: What YAML gave; changed in place. What does not fit is left for validation to tell.
        files: Fields that name files, by section: names with dots between them, empty for
            `data` itself. Where a section is a list, its items are meant.
        folder: Of the file that `data` was read from.
    """
    for _, part, name in _named(data, files):
        part[name] = str(folder / part[name])


def paths(data: object, files: Mapping[str, Sequence[str]]) -> Iterator[tuple[str, Path]]:
    """Yield the path to each field that names a file, and that file; arguments as `locate`'s."""
    for where, part, name in _named(data, files):
        yield where, Path(part[name])


def _named(
    data: object, files: Mapping[str, Sequence[str]]
) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Yield the path to each field that names a file, the mapping it stands in, and its name."""
    for section, names in files.items():
        for part in _parts(data, section.split(".") if section else []):
            for name in names:
                if isinstance(part.get(name), str) and part[name]:
                    yield f"{section}.{name}".lstrip("."), part, name


def _parts(data: object, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield every mapping at a path of names; a list stands for each of its items."""
    for item in data if isinstance(data, list) else [data]:
        if isinstance(item, dict):
            if names:
                yield from _parts(item.get(names[0]), names[1:])
            else:
                yield item
