"""A token policy for ANEE: keep recent tokens, and every n-th older one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from anee_core.hookspecs import hookimpl
from anee_core.interfaces import CachePolicy, CacheView
from anee_core.ranges import Count


@dataclass(frozen=True)
class StridedCachePolicy(CachePolicy):
    """Keep a recent window, and every n-th token before it.

    Options:
        every: distance between the older tokens that stay.
        recent: how many most recent tokens stay, the current one included.
    """

    name: ClassVar[str] = "strided"
    alike = True  # in all layers, by positions alone: one decision serves them

    every: Count = 4
    recent: Count = 64

    def retain(self, view: CacheView) -> Tensor:
        """Return the slots to keep after each new token, [B, T, S]."""
        position = view.position_ids[:, None, :]
        recent = position > view.query_position[:, :, None] - self.recent
        return recent | (position % self.every == 0)


@hookimpl
def anee_cache_policies() -> Mapping[str, type[CachePolicy]]:
    """Return the policy by the name that a policy string uses."""
    return {"strided": StridedCachePolicy}
