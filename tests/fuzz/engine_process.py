"""A fake engine as a process of its own; prints its address, and runs until it is killed."""

from __future__ import annotations

import asyncio

from tests.fakes import FakeEngine


async def main() -> None:
    async with FakeEngine(forgets=True).serving() as engine:
        print(engine.url, flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
