"""Whether the dispatcher and the engines of level 1 run as machine code."""

from __future__ import annotations

from vllm_workflow.core import dispatcher


def is_compiled() -> bool:
    """Return False for the sources, True for what `scripts/compile_core.py` made of them."""
    return not str(dispatcher.__file__).endswith(".py")
