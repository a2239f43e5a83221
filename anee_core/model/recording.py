"""Several forwards on one cache, gathered in one trace."""

from __future__ import annotations

from dataclasses import dataclass

from anee_core.accounting.trace import Trace
from anee_core.cache.adaptive_cache import AdaptiveCache


@dataclass(frozen=True, eq=False)
class Recording:
    """A trace that forwards on one cache are added to."""

    cache: AdaptiveCache
    """Cache whose forwards are recorded; a copy of it is not recorded."""
    trace: Trace
    """Trace that they are added to."""
    prompt: int
    """Tokens of the sequence that are its prompt, in however many pieces they come."""
    dense_prompt: bool
    """Whether every layer runs for the prompt, whatever the policy."""

    def dense_among(self, tokens: int) -> int:
        """Return for how many of the next ``tokens`` every layer runs, whatever the policy: the first ones."""
        return min(max(self.prompt - self.cache.seen, 0), tokens) if self.dense_prompt else 0

    def prompt_ends_among(self, tokens: int) -> bool:
        """Whether the last token of the prompt is among the next ``tokens``."""
        return self.cache.seen < self.prompt <= self.cache.seen + tokens
