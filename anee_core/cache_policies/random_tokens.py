"""Keep tokens at random: the control that every other token policy has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from anee_core.cache_policies.scoring import ScoringCachePolicy
from anee_core.interfaces.cache_policy import CacheView
from anee_core.interfaces.hashed_random import uniform
from anee_core.ranges import Seed


@dataclass(frozen=True)
class RandomTokensCachePolicy(ScoringCachePolicy):
    """Keep tokens at random, each layer others. The draw depends on layer, position and seed alone.

    Options:
        keep, least: see `BudgetedCachePolicy`.
        sinks: how many first tokens stay in any case.
        recent: how many newest tokens stay in any case.
        seed: of the draw.
    """

    name: ClassVar[str] = "random_tokens"

    seed: Seed = 0

    def first_score(self, view: CacheView) -> Tensor:
        """Return a random number for each new token."""
        position = view.query_position
        layer = torch.full_like(position, view.layer_idx)
        return uniform(layer, position, torch.zeros_like(position), self.seed)
