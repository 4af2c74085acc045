"""One process at a time for a file that two would spoil."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from vllm_workflow.core.errors import ConfigError


class FileLock:
    """Holds a file until it is closed, or its process ends in whatever way.

    What is locked is a file beside it, `….lock`, which stays and holds the process's number: to
    remove it would let two take it at once.

    Args:
        path: Of the file, which need not be there.
        what: Field that names it, for errors.

    Raises:
        ConfigError: Another process has it, or the folder cannot be written.
    """

    def __init__(self, path: Path, *, what: str) -> None:
        path = path.resolve()
        beside = path.with_name(f"{path.name}.lock")
        try:
            self._file = os.open(beside, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as e:
            raise ConfigError(f"{what}: cannot use {path}: {beside.name}: {e.strerror}") from None
        try:
            _lock(self._file)
        except BlockingIOError:
            holder = os.read(self._file, 32).decode("ascii", "replace").strip()
            os.close(self._file)
            raise ConfigError(
                f"{what}: {path} is in use by another router"
                + (f", process {holder}" if holder else "")
                + "; each router needs one of its own"
            ) from None
        except OSError as e:
            os.close(self._file)
            raise ConfigError(f"{what}: cannot lock {beside}: {e.strerror}") from None
        with suppress(OSError):  # a full disk; the lock holds
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, f"{os.getpid()}\n".encode(), 0)

    def close(self) -> None:
        """Let others have it."""
        os.close(self._file)


def _lock(file: int) -> None:
    """Lock an open file, for as long as it is open.

    Raises:
        BlockingIOError: Somebody else has it open and locked.
    """
    try:
        import fcntl
    except ModuleNotFoundError:  # not on Windows
        return
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
