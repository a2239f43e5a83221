"""What becomes of a token at a layer."""

from __future__ import annotations

from enum import IntEnum


class TokenState(IntEnum):
    """What becomes of a token at a layer."""

    PADDING = 0
    SKIPPED = 1
    RUNS = 2
    DEFERRED = 3
    """It skips the layer, and somebody else sees to its keys and values."""
