"""A plug-in of pytest for tests of the compiled copy."""

from collections.abc import Generator

import pytest

from vllm_workflow.router import proxy
from vllm_workflow.sim.compiled import is_compiled

_NOT_FOR_IT = ("interpreted classes cannot inherit from compiled", "is read-only")
"""What comes of tests that replace a part of what is compiled."""


def pytest_sessionstart(session: pytest.Session) -> None:
    """See that it is the compiled copy that is tested."""
    assert is_compiled()
    assert not str(proxy.__file__).endswith(".py")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    try:
        return (yield)
    except (TypeError, AttributeError) as e:
        if any(text in str(e) for text in _NOT_FOR_IT):
            pytest.skip(str(e))
        raise
