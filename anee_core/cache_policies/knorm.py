"""Keep the tokens with the shortest keys (Devoto et al., 2024, arXiv:2406.11430)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from anee_core.cache_policies.scoring import ScoringCachePolicy
from anee_core.interfaces.cache_policy import CacheView, Wants


@dataclass(frozen=True)
class KeyNormCachePolicy(ScoringCachePolicy):
    """Keep short keys, which tend to draw much attention: a token's score is minus its keys' mean L2 norm over heads.

    Options:
        keep, least: see `BudgetedCachePolicy`.
        sinks: how many first tokens stay in any case.
        recent: how many newest tokens stay in any case.
    """

    name: ClassVar[str] = "knorm"
    wants: ClassVar[Wants] = frozenset({"keys"})

    def first_score(self, view: CacheView) -> Tensor:
        """Return minus the norm of the new tokens' keys."""
        assert view.keys is not None
        new = view.keys[:, :, -view.query_position.shape[1] :]
        # In the first layer a word has the same norm wherever it stands. To three digits it is the same for rounding,
        # too, and the earlier token stays.
        return -new.float().norm(dim=-1).mean(1).half()
