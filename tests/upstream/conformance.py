"""A pytest plug-in: runs vLLM's own scheduler tests against other scheduler classes.

`WORKFLOW_CONFORMANCE=MODULE:VARIANT` names an object with attributes `sync` and `asynchronous`,
the classes to put in place of vLLM's; empty for vLLM's own. The outcome of each test goes to the
JSON file that `WORKFLOW_OUTCOMES` names.
"""

import contextlib
import importlib
import json
import logging
import os
import pathlib
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest


def _hide_stub_from_transformers() -> None:
    """Transformers must not process images with a torchvision that does nothing."""
    import transformers.utils.import_utils as import_utils

    is_available = import_utils._is_package_available

    def is_really_available(name: str, *args: Any, **kwargs: Any) -> Any:
        return is_available("no_" + name if name == "torchvision" else name, *args, **kwargs)

    import_utils._is_package_available = is_really_available
    import_utils.is_torchvision_available.cache_clear()


if "without_torchvision" in (getattr(find_spec("torchvision"), "origin", None) or ""):
    _hide_stub_from_transformers()
with contextlib.suppress(ImportError):
    # vLLM's own subclasses keep their bases.
    import vllm.v1.core.sched.diffusion_scheduler  # noqa: F401
import vllm.v1.core.sched.async_scheduler as async_module  # noqa: E402
import vllm.v1.core.sched.scheduler as sync_module  # noqa: E402

from vllm_workflow.engine import compat  # noqa: E402

_outcomes: dict[str, str] = {}


def _swap(name: str) -> None:
    module, _, attribute = name.partition(":")
    variant = getattr(importlib.import_module(module), attribute)
    sync_module.Scheduler = variant.sync
    async_module.AsyncScheduler = variant.asynchronous
    # A server refuses diffusion models; two of these tests build its base scheduler for one.
    compat.check_model = lambda vllm_config: None


if os.environ.get("WORKFLOW_CONFORMANCE"):
    _swap(os.environ["WORKFLOW_CONFORMANCE"])


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Keep the worst of set-up, call and tear-down."""
    if report.failed:
        _outcomes[report.nodeid] = "failed"
    else:
        _outcomes.setdefault(report.nodeid, report.outcome)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        _outcomes[report.nodeid] = "failed"


def pytest_sessionfinish() -> None:
    path = pathlib.Path(os.environ["WORKFLOW_OUTCOMES"])
    path.write_text(json.dumps(_outcomes, indent=1), encoding="utf-8")


@pytest.fixture
def caplog_vllm(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """As in the conftest of vLLM's tests, which needs packages that these tests do not."""
    logger = logging.getLogger("vllm")
    propagate, logger.propagate = logger.propagate, True
    yield caplog
    logger.propagate = propagate
