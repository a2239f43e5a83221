"""Keep the tokens that the newest one attends to the most (TOVA; Oren et al., 2024, arXiv:2401.06104)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from anee_core.cache_policies.scoring import AttentionCachePolicy
from anee_core.interfaces.cache_policy import CacheView


@dataclass(frozen=True)
class TovaCachePolicy(AttentionCachePolicy):
    """Drop what the newest token attends to the least, averaged over heads.

    A token that skips the layer attends to nothing, so the one before it still decides.

    Options:
        keep, least: see `BudgetedCachePolicy`.
        sinks: how many first tokens stay in any case.
        recent: how many newest tokens stay in any case.
    """

    name: ClassVar[str] = "tova"

    def score(self, view: CacheView, t: int, scores: Tensor, alive: Tensor) -> Tensor:
        """Return the newest token's attention."""
        if view.attention is None:
            return scores
        return torch.where(view.ran[:, t : t + 1], self.shares(view, t, alive), scores)
