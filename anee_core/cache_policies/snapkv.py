"""Keep what a window of queries attends to, and the neighbours (SnapKV; Li et al., 2024, arXiv:2404.14469)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from anee_core.cache_policies.scoring import AttentionCachePolicy
from anee_core.errors import PolicyError
from anee_core.interfaces.cache_policy import CacheView
from anee_core.ranges import Count, Within


@dataclass(frozen=True)
class SnapKVCachePolicy(AttentionCachePolicy):
    """At every multiple of ``every`` tokens, keep the older ones that the last ``window`` tokens attended to the most.

    In the paper this happens once, at the end of the prompt. Here it happens at fixed places of the sequence, so that
    it is the same however the sequence is read, and goes on while generating; between two of them tokens only come
    in. Votes are smoothed over ``pool`` neighbouring slots. All heads of a layer hold the same tokens.

    Options:
        keep, least: see `BudgetedCachePolicy`; holds after each drop.
        sinks: how many first tokens stay in any case.
        recent: how many newest tokens stay in any case, if more than the window.
        every: number of tokens from one drop to the next.
        window: how many tokens vote; they stay in any case.
        pool: width of the smoothing, odd.
    """

    name: ClassVar[str] = "snapkv"

    every: Count = 128
    window: Count = 32
    pool: Annotated[int, Within(1, 9999)] = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window > self.every or self.pool % 2 == 0:
            raise PolicyError(
                f"snapkv: window <= every and an odd pool are needed; got window {self.window}, "
                f"every {self.every}, pool {self.pool}"
            )

    def newest(self, allowed: Tensor) -> Tensor | int:
        """Return how many of the newest tokens stay in any case."""
        return max(self.window, self.recent)

    def score(self, view: CacheView, t: int, scores: Tensor, alive: Tensor) -> Tensor:
        """Add the newest token's vote if it lies in the window; the first one of a window starts from zero."""
        place = (view.query_position[:, t : t + 1] - (self.every - self.window)) % self.every
        scores = torch.where(place == 0, 0.0, scores)
        if view.attention is None:
            return scores
        return scores + (place < self.window) * self.shares(view, t, alive)

    def due(self, view: CacheView, t: int) -> Tensor:
        """Return the rows in which a window ends."""
        return (view.query_position[:, t : t + 1] + 1) % self.every == 0

    def rank_by(self, view: CacheView, scores: Tensor, alive: Tensor) -> Tensor:
        """Return smoothed votes; the window's own tokens come first."""
        # Neighbours are those among the slots still held: gaps are closed before smoothing.
        order = torch.argsort(~alive, dim=1, stable=True)
        votes = torch.where(alive, scores, 0.0).gather(1, order)
        near = torch.stack((votes, alive.gather(1, order).to(votes.dtype)))
        summed = functional.avg_pool1d(near, self.pool, 1, self.pool // 2)
        smooth = summed[0] / summed[1].clamp(min=1e-6)
        return torch.empty_like(scores).scatter_(1, order, smooth)
