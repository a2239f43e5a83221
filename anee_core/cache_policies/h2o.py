"""Keep the tokens that drew the most attention, and the recent ones (H2O; Zhang et al., 2023, arXiv:2306.14048)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from anee_core.cache_policies.scoring import AttentionCachePolicy
from anee_core.interfaces.cache_policy import CacheView
from anee_core.ranges import CountOrNone


@dataclass(frozen=True)
class H2OCachePolicy(AttentionCachePolicy):
    """Keep heavy hitters: a token's score is the sum of the attention that it got, averaged over heads.

    The paper drops per head; here all heads of a layer hold the same tokens.

    Options:
        keep, least: see `BudgetedCachePolicy`.
        sinks: how many first tokens stay in any case.
        recent: how many newest tokens stay in any case; 0 for half of the budget, as in the paper.
    """

    name: ClassVar[str] = "h2o"

    recent: CountOrNone = 0

    def newest(self, allowed: Tensor) -> Tensor | int:
        """Return how many of the newest tokens stay in any case."""
        return self.recent or allowed // 2

    def score(self, view: CacheView, t: int, scores: Tensor, alive: Tensor) -> Tensor:
        """Add the newest token's attention."""
        return scores if view.attention is None else scores + self.shares(view, t, alive)
