"""Several forwards on one cache, gathered in one trace."""

from __future__ import annotations

from dataclasses import dataclass

from anee_core.accounting.trace import Trace
from anee_core.cache.adaptive_cache import AdaptiveCache


@dataclass(eq=False)
class Recording:
    """A trace that forwards on one cache are added to."""

    cache: AdaptiveCache
    """Cache whose forwards are recorded."""
    trace: Trace
    """Trace that they are added to."""
    prompt_is_dense: bool
    """Whether the next forward reads a prompt and runs every layer, whatever the policy."""

    def reads_densely(self) -> bool:
        """Return whether the forward that begins now runs every layer; none after it does."""
        dense, self.prompt_is_dense = self.prompt_is_dense, False
        return dense
