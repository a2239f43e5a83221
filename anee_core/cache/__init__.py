"""What is remembered of tokens: keys and values, positions, and what policies note beside them."""

from anee_core.cache.adaptive_cache import AdaptiveCache

__all__ = ["AdaptiveCache"]
