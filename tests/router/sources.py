"""Where instances are found: a file, and sources that name what a test says."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.router.conftest import Client, until
from vllm_workflow.router.discovery import Discovery
from vllm_workflow.router.instance_config import InstanceConfig


def write(path: Path, *instances: dict[str, Any]) -> None:
    """Replace the file as a whole, as configuration managers do."""
    new = path.with_suffix(".new")
    new.write_text(yaml.safe_dump(list(instances)), encoding="utf-8")
    os.replace(new, path)


@dataclass
class Named:
    """A source that names what the test says, or fails."""

    name: str
    found: list[InstanceConfig] | None = None
    every_s: float = 0.01
    num_asked: int = 0

    async def find(self) -> list[InstanceConfig] | None:
        self.num_asked += 1
        if self.found is None:
            raise RuntimeError("broken")
        return self.found

    async def asked_twice_more(self) -> None:
        num_before = self.num_asked
        await until(lambda: self.num_asked >= num_before + 2)


@asynccontextmanager
async def discovering(client: Client, *sources: Named) -> AsyncIterator[None]:
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(Discovery(sources, client.router.upstreams).run())
        yield
        task.cancel()
