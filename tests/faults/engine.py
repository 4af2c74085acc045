"""Stands for `vllm serve`: a process with a socket that misbehaves where it is told to.

`engine.py PORT LOG [JSON]` listens and appends what happens to LOG, so that it is known even of a
process that was killed: `begin ID`, `first ID`, `end ID`, `refuse ID`, `abort ID`, each with the
monotonic time.
`POST /control` changes the fields of `Behaviour`. Standard library only: starts in milliseconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import signal
import socket
import sys
import time
from typing import Any

EXIT_STATUS = 3


@dataclasses.dataclass(slots=True)
class Behaviour:
    models: list[str] = dataclasses.field(default_factory=lambda: ["m"])
    prefill_s: float = 0.01
    token_s: float = 0.01
    slowness: float = 1.0
    """Times the durations above."""
    seats: int = 1000
    """Calls that run side by side; further ones wait."""
    status: int = 200
    """Of every answer to a call; other than 200 it is an error at once."""
    fails_at: str = ""
    """A model whose calls are answered with 500."""
    health: int = 200
    is_deaf: bool = False
    """Takes calls and never answers them, while it says that it is well."""
    is_mute: bool = False
    """Accepts connections and never answers anything."""
    closing: str = ""
    """`drain`: listens no more, and ends the calls that are under way. `hang`: keeps them and gives
    them nothing. `abort`: ends them at once, as if they were complete. vLLM does either of the
    latter after SIGTERM, by chance."""
    closes_kept: bool = False
    """Closes a kept connection when the next call comes by it, as a server may at any time."""
    cut_at: int = -1
    """Byte of an answer, its head included, before which something happens; -1: nothing."""
    cut_by: str = "close"
    """`close`, `reset`, `exit`, `stop` (the whole process); between two events `error` (one more,
    then [DONE]) or `end` (as if that were all)."""
    num_cuts: int = 1
    """Answers that this happens to."""
    token: str = "t"


class Cut(Exception):
    """The answer ends here."""


class Engine:
    def __init__(self, log: int, behaviour: Behaviour) -> None:
        self.behaviour = behaviour
        self.listens: asyncio.Server
        self._log = log
        self._seats = asyncio.Semaphore(behaviour.seats)

    def note(self, what: str, request_id: str) -> None:
        os.write(self._log, f"{what} {request_id} {time.monotonic():.6f}\n".encode())

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = Connection(self, reader, writer)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, Cut):
            await connection.run()
        writer.close()


class Connection:
    def __init__(
        self, engine: Engine, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.engine = engine
        self.reader = reader
        self.writer = writer
        self.num_sent = 0
        self.is_cut_short = False
        self.cut_at = -1
        self.early = b""
        """What was read while looking whether the client is still there."""

    @property
    def behaviour(self) -> Behaviour:
        return self.engine.behaviour

    async def run(self) -> None:
        num_calls = 0
        while True:
            head = self.early + await self.reader.readuntil(b"\r\n\r\n")
            self.early = b""
            method, path, headers = parse(head)
            body = await self.reader.readexactly(int(headers.get("content-length", 0)))
            if path == "/control":
                for name, value in json.loads(body).items():
                    setattr(self.behaviour, name, value)
                if self.behaviour.closing:
                    self.engine.listens.close()
                await self.reply(200, {})
                continue
            if self.behaviour.closing:
                return
            if self.behaviour.is_mute:
                await asyncio.Event().wait()
            if method == "GET":
                await self.get(path)
                continue
            num_calls += 1
            if num_calls > 1 and self.behaviour.closes_kept:
                return
            await self.call(headers.get("x-request-id", "?"), json.loads(body))

    async def get(self, path: str) -> None:
        if path == "/v1/models":
            models = [{"id": model, "object": "model"} for model in self.behaviour.models]
            await self.reply(200, {"object": "list", "data": models})
        else:
            await self.reply(self.behaviour.health, {})

    async def call(self, request_id: str, body: dict[str, Any]) -> None:
        """Answer, unless the client leaves before that."""
        self.engine.note("begin", request_id)
        answering = asyncio.ensure_future(self.answer(request_id, body))
        watching = asyncio.ensure_future(self.reader.read(1))
        try:
            await asyncio.wait((answering, watching), return_when=asyncio.FIRST_COMPLETED)
            if not answering.done() and watching.result() == b"":
                self.engine.note("abort", request_id)
                raise Cut
            await answering
            is_whole = answering.result() and not self.is_cut_short
            self.engine.note("end" if is_whole else "refuse", request_id)
            await asyncio.sleep(0)
            if watching.done():
                self.early = watching.result()
        except ConnectionError:
            self.engine.note("abort", request_id)
            raise
        finally:
            for task in (answering, watching):
                task.cancel()
            await asyncio.gather(answering, watching, return_exceptions=True)

    async def answer(self, request_id: str, body: dict[str, Any]) -> bool:
        """Answer as told; whether that was what was asked for."""
        b = self.behaviour
        if b.is_deaf:
            await asyncio.Event().wait()
        status = 500 if body.get("model") == b.fails_at else b.status
        if status != 200:
            await self.reply(status, error("scripted", status))
            return False
        if body.get("model") not in b.models:
            await self.reply(404, error(f"The model `{body.get('model')}` does not exist.", 404))
            return False
        self.num_sent, self.cut_at, self.is_cut_short = 0, -1, False
        if b.num_cuts > 0:
            self.cut_at = b.cut_at
        async with self.engine._seats:
            if body.get("stream"):
                await self.stream(request_id, int(body.get("max_tokens", 8)))
            else:
                await self.whole(request_id, int(body.get("max_tokens", 8)))
        return True

    async def whole(self, request_id: str, num_tokens: int) -> None:
        b = self.behaviour
        await asyncio.sleep(b.slowness * (b.prefill_s + num_tokens * b.token_s))
        reason = "stop"
        if await self.is_aborted():
            num_tokens, reason = num_tokens // 2, "abort"
            self.is_cut_short = True
        message = {"role": "assistant", "content": b.token * num_tokens}
        choice = {"index": 0, "message": message, "finish_reason": reason}
        await self.reply(200, completion(choices=[choice], usage=usage(num_tokens)))

    async def stream(self, request_id: str, num_tokens: int) -> None:
        b = self.behaviour
        await self.send(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        await asyncio.sleep(b.slowness * b.prefill_s)
        for i in range(num_tokens):
            if b.token_s or not i % 64:
                await asyncio.sleep(b.slowness * b.token_s)
            if await self.is_aborted():
                last = {"index": 0, "delta": {"content": ""}, "finish_reason": "abort"}
                await self.send_chunk(event(completion(choices=[last])))
                self.is_cut_short = True
                break
            delta = {"index": 0, "delta": {"content": b.token}, "finish_reason": None}
            await self.send_chunk(event(completion(choices=[delta])))
            if i == 0:
                self.engine.note("first", request_id)
        else:
            await self.send_chunk(event(completion(choices=[], usage=usage(num_tokens))))
        await self.send_chunk(b"data: [DONE]\n\n")
        await self.send(b"0\r\n\r\n")

    async def is_aborted(self) -> bool:
        if self.behaviour.closing == "hang":
            await asyncio.Event().wait()
        return self.behaviour.closing == "abort"

    async def send_chunk(self, data: bytes) -> None:
        await self.send(b"%x\r\n%b\r\n" % (len(data), data))

    async def reply(self, status: int, data: dict[str, Any]) -> None:
        body = json.dumps(data).encode()
        head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\n"
        await self.send(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)

    async def send(self, data: bytes) -> None:
        """Send all of it, or what comes before the cut."""
        if 0 <= self.cut_at < self.num_sent + len(data):
            if self.behaviour.cut_by not in {"error", "end"}:
                self.writer.write(data[: self.cut_at - self.num_sent])
                await self.writer.drain()
            self.behaviour.num_cuts -= 1
            await self.cut()
        self.num_sent += len(data)
        self.writer.write(data)
        await self.writer.drain()

    async def cut(self) -> None:
        by, self.cut_at = self.behaviour.cut_by, -1
        if by == "exit":
            os._exit(EXIT_STATUS)
        if by == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
            return
        if by == "error":
            await self.send_chunk(event(error("EngineCore encountered an issue", 500)))
            await self.send_chunk(b"data: [DONE]\n\n")
        if by in {"error", "end"}:
            await self.send(b"0\r\n\r\n")
        elif by == "reset":
            linger = b"\1\0\0\0\0\0\0\0"
            sock = self.writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.writer.close()
        raise Cut


def parse(head: bytes) -> tuple[str, str, dict[str, str]]:
    first, *lines = head.decode("latin-1").removesuffix("\r\n\r\n").split("\r\n")
    method, path, _ = first.split(" ")
    pairs = (line.partition(":") for line in lines)
    return method, path, {name.strip().lower(): value.strip() for name, _, value in pairs}


def completion(**fields: Any) -> dict[str, Any]:
    return {"id": "x", "object": "chat.completion", "created": 0, "model": "m", **fields}


def usage(num_tokens: int) -> dict[str, int]:
    return {"prompt_tokens": 10, "completion_tokens": num_tokens, "total_tokens": 10 + num_tokens}


def error(message: str, code: int) -> dict[str, Any]:
    return {"error": {"message": message, "type": "fake", "param": None, "code": code}}


def event(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data).encode() + b"\n\n"


async def main() -> None:
    port, path, *rest = sys.argv[1:]
    behaviour = Behaviour(**json.loads(rest[0])) if rest else Behaviour()
    engine = Engine(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), behaviour)
    engine.listens = await asyncio.start_server(engine.serve, "127.0.0.1", int(port), backlog=1024)
    print("ready", engine.listens.sockets[0].getsockname()[1], flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
