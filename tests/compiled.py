"""A plug-in of pytest for tests of the compiled copy."""

import pytest

from vllm_workflow.router import proxy
from vllm_workflow.sim.compiled import is_compiled


def pytest_sessionstart(session: pytest.Session) -> None:
    """See that it is the compiled copy that is tested."""
    assert is_compiled()
    assert not str(proxy.__file__).endswith(".py")
