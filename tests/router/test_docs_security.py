"""What docs/security.md says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from vllm_workflow.router import body
from vllm_workflow.router.admin import Admin
from vllm_workflow.router.config import RouterConfig
from vllm_workflow.router.credentials import KeyHash, new_key
from vllm_workflow.router.limits import LimitsConfig

PAGE = (Path(__file__).parents[2] / "docs" / "security.md").read_text(encoding="utf-8")


def test_the_defaults_are_those_of_the_code() -> None:
    told = {name: float(value) for name, value in re.findall(r"`limits\.(\w+): ([\d.]+)`", PAGE)}

    assert told == LimitsConfig().model_dump()
    assert f"`max_body_mb: {RouterConfig.model_fields['max_body_mb'].default:g}`" in PAGE
    assert f"JSON deeper than {body.MAX_DEPTH}," in PAGE
    assert f"above {body.MAX_CONTAINERS:,} objects and lists or {body.MAX_VALUES:,} values" in PAGE


def test_the_operators_paths_are_those_of_the_application() -> None:
    nothing: Any = None
    app = Admin(nothing, nothing, nothing, nothing, nothing, nothing).build()
    routes = {
        f"{route.method} {route.resource.canonical}"
        for route in app.router.routes()
        if route.resource is not None and route.method not in {"HEAD", "*"}
    }
    told = re.findall(r"^\| `([A-Z]+ /[\w/]+)(?:\?[^`]*)?` \|", PAGE, re.MULTILINE)

    assert {path.replace("/ID", "/{id}") for path in told} == routes


def test_the_example_is_a_configuration(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (found,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    while "sha256:…" in found:
        found = found.replace("sha256:…", str(KeyHash.of(new_key())), 1)
    data: dict[str, Any] = yaml.safe_load(found)
    del data["tls"], data["instances"][0]["tls"]  # files that are not here
    (tmp_path / "gateway.key").write_text(new_key(), "ascii")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VLLM_KEY", "sesame")

    config = RouterConfig.from_mapping(data, source="docs/security.md")

    assert config.auth is not None
    assert [key.tenant for key in config.auth.keys] == ["acme", "batch", "gateway"]
