"""A call that is sent again while it is still running does not run twice.

SDKs repeat a call whose answer did not come in time, also when only the way back was broken. A
call is known again by its `Idempotency-Key`, or by an `X-Request-Id` of the client's own together
with the `x-stainless-retry-count` of OpenAI's SDKs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from hashlib import blake2b
from typing import NamedTuple

from vllm_workflow.router.errors import RequestError
from vllm_workflow.router.exchange import Answer, Exchange, Reply
from vllm_workflow.router.headers import Headers
from vllm_workflow.router.wire import is_label


class Key(NamedTuple):
    """What tells one call from all others."""

    tenant_id: str
    authorization: str
    workflow_id: str
    kind: str
    value: str


class Running:
    """A call under way, and the clients that wait for its answer.

    For whoever makes the answer all of them are one. An answer that comes piece by piece goes to
    the client that has come last, since those before it may be gone without a word.
    """

    def __init__(self, key: Key, body: bytes, *, is_stream: bool) -> None:
        self.key = key
        self.digest = _digest(body)
        self.task: asyncio.Task[Answer] | None = None
        """Makes the answer, if several may wait for it, until it has."""
        self._is_stream = is_stream
        self._waiting: dict[Exchange, asyncio.Future[Answer]] = {}
        self._reader: Exchange | None = None

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def has_reader(self) -> bool:
        """Whether somebody has a part of the answer already."""
        return self._is_stream or self._reader is not None

    async def answer(self, exchange: Exchange) -> Answer:
        """Wait for the answer.

        Raises:
            RequestError: It goes to another client.
        """
        self._waiting[exchange] = asyncio.get_running_loop().create_future()
        try:
            return await self._waiting[exchange]
        finally:
            del self._waiting[exchange]

    def ended(self, task: asyncio.Task[Answer]) -> None:
        """Tell those who wait how the call has ended."""
        error = None if task.cancelled() else task.exception()
        for waiting in self._waiting.values():
            if waiting.done():
                continue
            if task.cancelled():
                waiting.cancel()
            elif error is not None:
                waiting.set_exception(error)
            else:
                waiting.set_result(task.result())
        # A task knows where it was cancelled, and all that was there: it would stay until cycles
        # are looked for.
        self.task = None

    def give_up(self) -> None:
        """End the call, for which nobody waits any more."""
        if self.task is not None:
            self.task.cancel()

    def _to(self) -> Exchange:
        if self._reader is None:
            raise ConnectionResetError("all clients have left")
        return self._reader

    async def begin(self, answer: Answer) -> None:
        there = [each for each, waiting in self._waiting.items() if not waiting.done()]
        self._reader = there.pop() if there else None
        for exchange in there:
            self._waiting[exchange].set_exception(_read_by_another(self.key))
        await self._to().begin(answer)

    async def write(self, data: bytes) -> None:
        await self._to().write(data)

    def close(self) -> None:
        self._to().close()

    def abort(self) -> None:
        self._to().abort()


def key_of(headers: Headers, *, tenant_id: str, workflow_id: str) -> tuple[Key, bool] | None:
    """Return by what a call is known again, and whether it is sent again; None if by nothing.

    Args:
        headers: Of the request.
        tenant_id: Tenants do not meet each other's calls.
        workflow_id: Runs neither.
    """
    key = headers.get("idempotency-key")
    if is_label(key):
        who = tenant_id, headers.get("authorization"), workflow_id
        return Key(*who, "Idempotency-Key", key), True
    count = headers.get("x-stainless-retry-count")
    if not count:
        return None
    request_id = headers.get("x-request-id")
    if is_label(request_id):
        who = tenant_id, headers.get("authorization"), workflow_id
        return Key(*who, "X-Request-Id", request_id), count != "0"
    return None


class Once:
    """The calls under way that would be known again; owned by one event loop."""

    def __init__(self) -> None:
        self._running: dict[Key, Running] = {}

    def __len__(self) -> int:
        return len(self._running)

    def begin_stream(self, key: Key, body: bytes, *, again: bool) -> bool:
        """Note a stream, `end_stream` must follow if True; False if another call has that key.

        Raises:
            RequestError: It runs already; its answer has one reader.
        """
        running = self._running.get(key)
        if running is None:
            self._running[key] = Running(key, body, is_stream=True)
            return True
        if again and _checked(running, key, body):
            raise _read_by_another(key)
        return False

    def end_stream(self, key: Key) -> None:
        del self._running[key]

    async def answer(
        self,
        key: Key,
        body: bytes,
        exchange: Exchange,
        start: Callable[[Reply], Coroutine[None, None, Answer]],
        *,
        again: bool,
    ) -> Answer:
        """Return the answer of the call of that key, which runs once for all who wait for it.

        It is given up when the last one has left.

        Args:
            key: Of the call.
            body: As it was sent.
            exchange: With the client.
            start: Makes the answer; is given where to write one that is not returned whole.
            again: The client says that it has sent it before, or might have.

        Raises:
            RequestError: The key is that of another call under way, or the answer goes, as it
                comes, to another client.
        """
        running = self._running.get(key)
        if running is not None and not (again and _checked(running, key, body)):
            return await start(exchange)
        if running is None:
            running = self._begun(key, body, start)
        if running.has_reader:
            raise _read_by_another(key)
        try:
            return await running.answer(exchange)
        finally:
            if not running.num_waiting:
                self._drop(key, running)  # who comes now must not wait for what is given up
                running.give_up()

    def _begun(
        self, key: Key, body: bytes, start: Callable[[Reply], Coroutine[None, None, Answer]]
    ) -> Running:
        running = self._running[key] = Running(key, body, is_stream=False)
        running.task = asyncio.ensure_future(start(running))

        def ended(task: asyncio.Task[Answer]) -> None:
            self._drop(key, running)
            running.ended(task)

        running.task.add_done_callback(ended)
        return running

    def _drop(self, key: Key, running: Running) -> None:
        """Forget a call, unless another one has come under its key since."""
        if self._running.get(key) is running:
            del self._running[key]


def _read_by_another(key: Key) -> RequestError:
    return RequestError(
        f"{key.kind}: this call is still running, and its answer is being read",
        status=409,
        param=key.kind,
        code="already_running",
    )


def _checked(running: Running, key: Key, body: bytes) -> bool:
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
