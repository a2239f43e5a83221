"""The loop over layers: embed, observe, decide, run or propagate, and what that drops from the cache."""

from anee_core.engine.engine import Engine

__all__ = ["Engine"]
