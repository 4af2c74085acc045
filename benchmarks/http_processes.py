"""Servers that answer at once and routers before them, as processes of a benchmark."""

from __future__ import annotations

import json
import sys
from contextlib import AsyncExitStack
from pathlib import Path

from vllm_workflow.bench.system_fleet import free_ports
from vllm_workflow.cluster.process import ManagedProcess

BACKEND = str(Path(__file__).with_name("http_backend.py"))
_START_TIMEOUT_S = 60.0


async def started(
    stack: AsyncExitStack, name: str, command: list[str], url: str, folder: Path
) -> ManagedProcess:
    """Start a process that lives as long as the stack; return when it answers."""
    log_path = folder / f"{name.replace(':', '-')}.log"
    process = ManagedProcess(name=name, command=command, url=url, log_path=log_path)
    await process.start()
    stack.push_async_callback(process.stop)
    await process.ready("/health", (200,), _START_TIMEOUT_S)
    return process


async def started_servers(stack: AsyncExitStack, number: int, folder: Path) -> list[str]:
    """Start so many servers; return their URLs."""
    ports = free_ports(number)
    for port in ports:
        command = [sys.executable, BACKEND, "serve", str(port)]
        await started(stack, f"server {port}", command, f"http://127.0.0.1:{port}", folder)
    return [f"http://127.0.0.1:{port}" for port in ports]


async def started_router(
    stack: AsyncExitStack, policy: str, urls: list[str], folder: Path
) -> ManagedProcess:
    """Start this project's router before servers."""
    (port,) = free_ports(1)
    config = {
        "port": port,
        "policy": policy,
        "log_level": "warning",
        "instances": [{"url": url, "id": f"i{i}"} for i, url in enumerate(urls)],
    }
    path = folder / f"{policy}.yaml"
    path.write_text(json.dumps(config), encoding="utf-8")  # which is YAML
    command = [sys.executable, "-m", "vllm_workflow.cli.main", "router", "--config", str(path)]
    return await started(stack, policy, command, f"http://127.0.0.1:{port}", folder)
