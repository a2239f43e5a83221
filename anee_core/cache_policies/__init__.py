"""Token policies, one method per file."""

from anee_core.cache_policies.full import FullCachePolicy
from anee_core.cache_policies.window import WindowCachePolicy

__all__ = ["FullCachePolicy", "WindowCachePolicy"]
