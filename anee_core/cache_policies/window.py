"""Keep the first tokens and the most recent ones (StreamingLLM; Xiao et al., 2023, arXiv:2309.17453)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from anee_core.cache_policies.budget import BudgetedCachePolicy, Kept
from anee_core.interfaces.cache_policy import CachePolicy, CacheView
from anee_core.interfaces.setting import Setting
from anee_core.ranges import Count, CountOrNone


@dataclass(frozen=True)
class WindowCachePolicy(BudgetedCachePolicy):
    """Keep attention sinks and a recent window. Tokens keep the positions they were read at.

    Options:
        keep, least: see `BudgetedCachePolicy`; sinks and window together. Without it ``recent`` counts.
        sinks: how many first tokens of the sequence to keep.
        recent: how many most recent tokens to keep, the current one included.
    """

    name: ClassVar[str] = "window"

    keep: tuple[Kept, ...] = ()
    sinks: CountOrNone = 4
    recent: Count = 256

    def __post_init__(self) -> None:
        if self.keep == ():
            CachePolicy.__post_init__(self)
        else:
            super().__post_init__()

    @property
    def alike(self) -> bool:
        """Whether there is one budget for all layers; a policy derived from this one may look at more."""
        return len(self.keep) < 2 and type(self) is WindowCachePolicy

    def bind(self, setting: Setting) -> CachePolicy:
        """Check the budgets against the model."""
        return super().bind(setting) if self.keep else self

    def retain(self, view: CacheView) -> Tensor:
        """Return the slots of the sinks and of the window."""
        query = view.query_position
        sinks, recent = torch.full_like(query, self.sinks), torch.full_like(query, self.recent)
        if self.keep:
            # A budget of fewer tokens than there are sinks is the newest token's first.
            allowed = self.allowed(view.layer_idx, query)
            sinks, recent = (allowed - 1).clamp(max=self.sinks), (allowed - self.sinks).clamp(min=1)
        position = view.position_ids[:, None, :]
        return (position > (query - recent)[:, :, None]) | (position < sinks[:, :, None])
