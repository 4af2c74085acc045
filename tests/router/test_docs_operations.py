"""docs/operations.md: what it shows of router.yaml can be used, and what it names is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from vllm_workflow.router.config import RouterConfig

DOCS = Path(__file__).parents[2] / "docs"
TEXT = (DOCS / "operations.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("block", re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL))
def test_each_example_is_a_configuration(block: str) -> None:
    data = {"instances": [{"url": "http://a:1"}], **yaml.safe_load(block)}

    RouterConfig.from_mapping(data, source="docs/operations.md")


@pytest.mark.parametrize(
    "example",
    [
        {"dashboard": False},
        {"tracing": {"otlp_endpoint": "http://127.0.0.1:4318/v1/traces"}},
        {"log_format": "json"},
        {"log_calls": True},
    ],
)
def test_each_field_that_it_names_is_one(example: dict[str, object]) -> None:
    (name,) = example
    assert f"`{name}:" in TEXT
    RouterConfig.from_mapping({"instances": [{"url": "http://a:1"}], **example}, source="test")
