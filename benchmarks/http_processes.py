"""Servers that answer at once and routers before them, as processes of a benchmark."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from urllib.parse import quote

import vllm_workflow
from vllm_workflow.bench.system_fleet import free_ports
from vllm_workflow.cluster.process import ManagedProcess
from vllm_workflow.core.errors import ConfigError

BACKEND = str(Path(__file__).with_name("http_backend.py"))
_START_TIMEOUT_S = 60.0


async def started(
    stack: AsyncExitStack,
    name: str,
    command: list[str],
    url: str,
    folder: Path,
    env: Mapping[str, str] | None = None,
) -> ManagedProcess:
    """Start a process that lives as long as the stack; return when it answers."""
    log_path = folder / f"{quote(name, safe='')}.log"
    process = ManagedProcess(name=name, command=command, url=url, log_path=log_path, env=env or {})
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
    stack: AsyncExitStack,
    name: str,
    urls: list[str],
    folder: Path,
) -> ManagedProcess:
    """Start this project's router before servers.

    Args:
        stack: Ends it.
        name: The policy that it decides by; or `POLICY@FOLDER`, of the package in that folder,
            `out/compiled` or the work tree of another version.
        urls: Of the servers.
        folder: For its configuration and its log.

    Raises:
        ConfigError: There is no package in that folder.
    """
    policy, _, folder_of = name.partition("@")
    package_in = Path(folder_of) if folder_of else Path(vllm_workflow.__file__).parents[1]
    if not (package_in / "vllm_workflow").is_dir():
        raise ConfigError(f"{name}: expected a package in {package_in}, got none")
    (port,) = free_ports(1)
    config = {
        "port": port,
        "policy": policy,
        "log_level": "warning",
        "instances": [{"url": url, "id": f"i{i}"} for i, url in enumerate(urls)],
    }
    path = folder / f"router-{port}.yaml"
    path.write_text(json.dumps(config), encoding="utf-8")  # which is YAML
    command = [sys.executable, "-P", "-m", "vllm_workflow.cli.main", "router"]
    command += ["--config", str(path)]
    env = {"PYTHONPATH": str(package_in.resolve())}
    return await started(
        stack, f"{policy}-{port}", command, f"http://127.0.0.1:{port}", folder, env
    )
