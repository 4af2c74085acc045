"""What needs vLLM is collected only where vLLM is."""

import warnings
from importlib.util import find_spec

import pytest

if find_spec("vllm"):
    with warnings.catch_warnings():  # those of vLLM's dependencies are none of ours
        warnings.simplefilter("ignore")
        import vllm_workflow.emulation.compat  # noqa: F401

NEED_VLLM = ["test_emulated_requests.py", "test_emulation_plugin.py", "test_emulation_tokens.py"]
collect_ignore = [] if find_spec("vllm") else NEED_VLLM


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.name in NEED_VLLM and item.path.parent.name == "emulation":
            item.add_marker(pytest.mark.vllm)
            item.add_marker(pytest.mark.filterwarnings("ignore::DeprecationWarning"))
