"""Answers that the router gives itself, in OpenAI's form."""

from __future__ import annotations

import json
from collections.abc import Mapping

from aiohttp import web

from vllm_workflow.core.errors import WorkflowError


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

    def response(self) -> web.Response:
        """Return what the client gets."""
        return error_response(
            self.status, str(self), param=self.param, code=self.code, headers=self.headers
        )


def malformed(where: str, wanted: str, got: object) -> RequestError:
    """A value of ours that cannot be read: what, where, got, wanted."""
    return RequestError(f"{where}: expected {wanted}, got {got!a:.80}", param=where.split()[-1])


def error_json(
    status: int, message: str, *, param: str | None = None, code: str | None = None
) -> bytes:
    """Return the body that OpenAI clients expect of a failed call."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    error = {"message": message, "type": kind, "param": param, "code": code}
    return json.dumps({"error": error}).encode()


def error_response(
    status: int,
    message: str,
    *,
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> web.Response:
    body = error_json(status, message, param=param, code=code)
    return web.Response(
        status=status, body=body, content_type="application/json", headers=headers or {}
    )
