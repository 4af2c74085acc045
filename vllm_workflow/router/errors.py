"""Answers that the router gives itself, in OpenAI's form."""

from __future__ import annotations

import json
from collections.abc import Mapping

from aiohttp import web

from vllm_workflow.core.errors import UpstreamError, WorkflowError
from vllm_workflow.router.exchange import Answer, response_of
from vllm_workflow.router.headers import Headers

_MAX_SHOWN = 80


class RequestError(WorkflowError, ValueError):
    """A request that the router answers itself, with a 4xx status."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = headers

    def answer(self) -> Answer:
        """Return what the client gets."""
        return error_answer(
            self.status, str(self), param=self.param, code=self.code, headers=self.headers
        )

    def response(self) -> web.Response:
        """Return the same for aiohttp."""
        return response_of(self.answer())


class BrokenOffError(UpstreamError):
    """A connection ended, or what came on it is no HTTP, before the answer was whole."""


class LostError(UpstreamError):
    """An attempt ended before the client got anything of an answer.

    `reason` is `refused` (no connection, so nothing was sent), `closed` (a kept connection was
    closed without an answer, as servers do with idle ones), `disconnected`, `hung`, `aborted` (the
    engine itself gave it up, as when it is told to stop) or `unauthorized` (the key that the
    router has for that instance is not right any more; the client's own is no matter of it).
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def malformed(where: str, wanted: str, got: object) -> RequestError:
    """A value of ours that cannot be read: what, where, got, wanted."""
    shown = ascii(got)
    shown = shown if len(shown) <= _MAX_SHOWN else f"{shown[: _MAX_SHOWN - 3]}..."
    return RequestError(f"{where}: expected {wanted}, got {shown}", param=where.split()[-1])


def error_json(
    status: int, message: str, *, param: str | None = None, code: str | None = None
) -> bytes:
    """Return the body that OpenAI clients expect of a failed call."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    error = {"message": message, "type": kind, "param": param, "code": code}
    return json.dumps({"error": error}).encode()


def error_answer(
    status: int,
    message: str,
    *,
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Answer:
    body = error_json(status, message, param=param, code=code)
    named = {"Content-Type": "application/json", **(headers or {})}
    return Answer(status, Headers.of(named.items()), body)


def error_response(
    status: int,
    message: str,
    *,
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> web.Response:
    """Return an error's answer for aiohttp."""
    return response_of(error_answer(status, message, param=param, code=code, headers=headers))
