"""What becomes of a token at a layer."""

from __future__ import annotations

from enum import IntEnum


class TokenState(IntEnum):
    """What becomes of a token at a layer."""

    PADDING = 0
    """It is no token."""
    SKIPPED = 1
    """It skips the layer, and gets its keys and values there."""
    RUNS = 2
    """It runs the layer."""
    DEFERRED = 3
    """It skips the layer, and somebody else sees to its keys and values."""
