"""The tree of errors. Each is also a kind of the builtin it resembles."""

from __future__ import annotations


class WorkflowError(Exception):
    """Base of every error that this package raises on purpose."""


class ConfigError(WorkflowError, ValueError):
    """A configuration that cannot be used; the message names file, field, got and wanted."""


def because(error: Exception) -> str:
    """Return what an error says, of the system's without number and path."""
    return (isinstance(error, OSError) and error.strerror) or str(error)


class NoInstanceError(WorkflowError, LookupError):
    """No instance can take the request."""


class BudgetExceededError(WorkflowError, TimeoutError):
    """Nothing of the run's budget is left."""


class QuotaExceededError(WorkflowError, RuntimeError):
    """A tenant asks for more than it may use, and waiting does not help.

    Args:
        message: Which quota, and how far.
        retry_after_s: When it would help to ask again; None: never.
    """

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class UpstreamError(WorkflowError, ConnectionError):
    """An instance did not answer, or not as an OpenAI-compatible server does."""


class OverloadedError(WorkflowError, TimeoutError):
    """A run is refused, before its first call, because it would begin too late."""

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
