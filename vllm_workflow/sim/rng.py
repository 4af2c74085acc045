"""Random streams that do not disturb each other."""

from __future__ import annotations

import random


def stream(seed: int, *names: str | int) -> random.Random:
    """Return the stream of one subsystem: the same for the same names, whatever others draw.

    Args:
        seed: Of the whole experiment.
        names: Of the subsystem, from the general to the special.
    """
    # A text seed is hashed with SHA-512, the same in every process and on every platform.
    return random.Random("\x1f".join(map(str, (seed, *names))))
