"""Engine tests build vLLM's schedulers in process; without vLLM they are not collected."""

import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

collect_ignore_glob = [] if find_spec("vllm") else ["*.py"]

if find_spec("vllm"):
    with warnings.catch_warnings():  # those of vLLM's dependencies are none of ours
        warnings.simplefilter("ignore")
        from tests.engine.engine_builders import build_scheduler, write_config


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.vllm)
            item.add_marker(pytest.mark.filterwarnings("ignore::DeprecationWarning"))


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration without weights: all that a scheduler reads of a model."""
    return write_config(tmp_path_factory.mktemp("model"))


@pytest.fixture
def make_scheduler(model_dir: Path) -> Callable[..., Any]:
    """Build a real scheduler; see `build_scheduler` for the arguments."""
    return lambda **kwargs: build_scheduler(model_dir, **kwargs)
