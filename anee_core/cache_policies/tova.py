"""Keep the tokens that the newest one attends to the most (TOVA; Oren et al., 2024, arXiv:2401.06104)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from anee_core.cache_policies.scoring import ScoringCachePolicy, attention_shares
from anee_core.interfaces import CacheView


@dataclass(frozen=True)
class TovaCachePolicy(ScoringCachePolicy):
    """Drop what the newest token attends to the least, averaged over heads.

    A token that skips the layer attends to nothing, so the one before it still decides.

    Options:
        keep: see `BudgetedCachePolicy`.
        sinks: how many first tokens stay in any case.
        recent: how many newest tokens stay in any case.
    """

    name: ClassVar[str] = "tova"
    wants: ClassVar[frozenset[Literal["states", "keys", "attention"]]] = frozenset({"attention"})
    rewrites: ClassVar[bool] = True

    def first_score(self, view: CacheView) -> Tensor:
        """Return zeros: nobody has attended to a new token."""
        return torch.zeros_like(view.query_position, dtype=torch.float32)

    def score(self, view: CacheView, t: int, scores: Tensor, held: Tensor) -> Tensor:
        """Return the newest token's attention."""
        if view.attention is None:
            return scores
        return torch.where(view.ran[:, t : t + 1], attention_shares(view, t, held), scores)
