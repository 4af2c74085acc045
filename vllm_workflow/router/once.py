"""A call that is sent again while it is still running does not run twice.

SDKs repeat a call whose answer did not come in time, also when only the way back was broken. A
call is known again by its `Idempotency-Key`, or by an `X-Request-Id` of the client's own together
with the `x-stainless-retry-count` of OpenAI's SDKs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, NamedTuple, TypeVar

from multidict import istr

from vllm_workflow.router.errors import RequestError
from vllm_workflow.router.wire import is_label

T = TypeVar("T")
_IDEMPOTENCY_KEY, _AUTHORIZATION = istr("Idempotency-Key"), istr("Authorization")
_RETRY_COUNT, _REQUEST_ID = istr("x-stainless-retry-count"), istr("X-Request-Id")


class Key(NamedTuple):
    """What tells one call from all others."""

    tenant_id: str
    authorization: str
    workflow_id: str
    kind: str
    value: str


@dataclass(slots=True)
class _Running:
    digest: bytes
    task: asyncio.Task[Any] | None
    """None for a stream, which has one reader."""
    num_waiting: int = 0


def key_of(
    headers: Mapping[str, str], *, tenant_id: str, workflow_id: str
) -> tuple[Key, bool] | None:
    """Return by what a call is known again, and whether it is sent again; None if by nothing.

    Args:
        headers: Case-insensitive.
        tenant_id: Tenants do not meet each other's calls.
        workflow_id: Runs neither.
    """
    key = headers.get(_IDEMPOTENCY_KEY, "")
    if is_label(key):
        who = tenant_id, headers.get(_AUTHORIZATION, ""), workflow_id
        return Key(*who, "Idempotency-Key", key), True
    count = headers.get(_RETRY_COUNT, "")
    if not count:
        return None
    request_id = headers.get(_REQUEST_ID, "")
    if is_label(request_id):
        who = tenant_id, headers.get(_AUTHORIZATION, ""), workflow_id
        return Key(*who, "X-Request-Id", request_id), count != "0"
    return None


class Once:
    """The calls under way that would be known again; owned by one event loop."""

    def __init__(self) -> None:
        self._running: dict[Key, _Running] = {}

    def __len__(self) -> int:
        return len(self._running)

    def begin_stream(self, key: Key, body: bytes, *, again: bool) -> bool:
        """Note a stream, `end_stream` must follow if True; False if another call has that key.

        Raises:
            RequestError: It runs already; its answer has one reader.
        """
        running = self._running.get(key)
        if running is None:
            self._running[key] = _Running(_digest(body), None)
            return True
        if again and _checked(running, key, body):
            raise RequestError(
                f"{key.kind}: this call is still running, and its stream is being read",
                status=409,
                param=key.kind,
                code="already_running",
            )
        return False

    def end_stream(self, key: Key) -> None:
        del self._running[key]

    async def answer(
        self,
        key: Key,
        body: bytes,
        start: Callable[[], Coroutine[None, None, T]],
        *,
        again: bool,
    ) -> T:
        """Return the answer of the call of that key, which runs once for all who wait for it.

        It is given up when the last one has left.

        Args:
            key: Of the call.
            body: As it was sent.
            start: Makes the answer.
            again: The client says that it has sent it before, or might have.

        Raises:
            RequestError: The key is that of another call under way.
        """
        running = self._running.get(key)
        if running is not None and not (again and _checked(running, key, body)):
            return await start()
        if running is None:
            running = _Running(_digest(body), asyncio.ensure_future(start()))
            self._running[key] = running
            assert running.task is not None
            mine = running
            running.task.add_done_callback(lambda _: self._drop(key, mine))
        if running.task is None:
            raise RequestError(
                f"{key.kind}: this call is still running, as a stream",
                status=409,
                param=key.kind,
                code="already_running",
            )
        running.num_waiting += 1
        try:
            answer: T = await asyncio.shield(running.task)
        finally:
            running.num_waiting -= 1
            if not running.num_waiting:
                self._drop(key, running)  # who comes now must not wait for what is given up
                running.task.cancel()
        return answer

    def _drop(self, key: Key, running: _Running) -> None:
        """Forget a call, unless another one has come under its key since."""
        if self._running.get(key) is running:
            del self._running[key]


def _checked(running: _Running, key: Key, body: bytes) -> bool:
    """Whether it is the same call; a request id may belong to several, an explicit key not.

    Raises:
        RequestError: It is another one under the same explicit key.
    """
    if running.digest == _digest(body):
        return True
    if key.kind == "Idempotency-Key":
        raise RequestError(
            "Idempotency-Key: expected the body of the call that is running under this key, "
            "got another one",
            status=422,
            param=key.kind,
            code="idempotency_key_reused",
        )
    return False


def _digest(body: bytes) -> bytes:
    return blake2b(body, digest_size=16).digest()
