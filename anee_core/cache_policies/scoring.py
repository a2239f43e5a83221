"""Token policies that keep the best-scored tokens within a budget."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from anee_core.cache_policies.budget import BudgetedCachePolicy
from anee_core.interfaces.cache_policy import CacheView, Wants
from anee_core.ranges import CountOrNone

_SCORE = "score"
_FIRST = 1e30
"""A number above every score."""


@dataclass(frozen=True)
class ScoringCachePolicy(BudgetedCachePolicy):
    """Keep the tokens with the highest scores.

    Tokens are taken one after another, since what one of them drops is gone for the next. The first ``sinks`` tokens
    of a sequence and the ``recent`` newest stay before all others.
    """

    sinks: CountOrNone = 0
    recent: CountOrNone = 1

    @abstractmethod
    def first_score(self, view: CacheView) -> Tensor:
        """Return the scores of the new tokens as they come, [B, T]."""

    def score(self, view: CacheView, t: int, scores: Tensor, alive: Tensor) -> Tensor:
        """Return the scores [B, S] after new token ``t``; ``alive`` [B, S] are the slots it finds, itself included."""
        return scores

    def newest(self, allowed: Tensor) -> Tensor | int:
        """Return how many of the newest tokens stay before all others, where ``allowed`` [B, 1] may be held."""
        return self.recent

    def due(self, view: CacheView, t: int) -> Tensor:
        """Return in which rows tokens may be dropped after new token ``t``, a bool tensor that broadcasts to [B, 1]."""
        return torch.ones(1, 1, dtype=torch.bool, device=view.valid.device)

    def rank_by(self, view: CacheView, scores: Tensor, alive: Tensor) -> Tensor:
        """Return what decides who stays, [B, S], given the scores."""
        return scores

    def remember(self, view: CacheView) -> Mapping[str, Tensor]:
        """Store each new token's first score."""
        return {_SCORE: self.first_score(view).float()}

    def keep_after(self, view: CacheView, t: int, scores: Tensor, alive: Tensor) -> Tensor:
        """Return which slots stay after new token ``t``, [B, S]."""
        position, query = view.position_ids, view.query_position[:, t : t + 1]
        allowed = self.allowed(view.layer_idx, query)
        due = self.due(view, t)
        # One token more than allowed is what decoding comes to; on a device, looking would take longer than sorting.
        known = alive.device.type == "cpu"
        over = (alive.sum(1, keepdim=True) - allowed) * due
        excess = int(over.max()) if known else alive.shape[1]
        if excess <= 0:
            return alive
        order = self.rank_by(view, scores, alive).double()
        # Before any score: the newest token, then the sinks from the first on, then the recent ones from the last on.
        place = 1e-9 * position.double()
        order = torch.where(position > query - self.newest(allowed), _FIRST * (1 + place), order)
        order = torch.where(position < self.sinks, _FIRST * (3 - place), order)
        order = torch.where(position == query, 4 * _FIRST, order)
        if excess == 1:
            # Of equals the last one goes, as in a stable sort.
            worst = alive.shape[1] - 1 - torch.where(alive, order, torch.inf).flip(1).argmin(1, keepdim=True)
            return alive & ~((over > 0) & (torch.arange(alive.shape[1], device=alive.device) == worst))
        best = torch.argsort(torch.where(alive, order, -torch.inf), dim=1, descending=True, stable=True)
        rank = torch.empty_like(best).scatter_(1, best, torch.arange(best.shape[1], device=best.device).expand_as(best))
        return alive & ((rank < allowed) | ~due)

    def decide(self, view: CacheView) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Take the new tokens one after another; see `CachePolicy.decide`."""
        scores = view.state[_SCORE].clone()
        slots = view.valid.shape[1]
        tokens = view.query_position.shape[1]
        left = view.valid.clone()
        kept = []
        for t in range(tokens):
            end = slots - tokens + t + 1
            # Only the slots up to this token's own take part.
            alive = left[:, :end]
            seen = replace(view, position_ids=view.position_ids[:, :end], valid=alive)
            real = view.real[:, t : t + 1]  # padding neither scores nor drops
            scores[:, :end] = torch.where(real, self.score(seen, t, scores[:, :end], alive), scores[:, :end])
            stay = self.keep_after(seen, t, scores[:, :end], alive) | ~real
            left[:, :end] = alive & stay
            kept.append(left.clone())
        return torch.stack(kept, dim=1), {_SCORE: scores} if self.rewrites else {}

    def retain(self, view: CacheView) -> Tensor:
        """Return what `decide` keeps."""
        return self.decide(view)[0]


@dataclass(frozen=True)
class AttentionCachePolicy(ScoringCachePolicy):
    """Score tokens by the attention that they get."""

    wants: ClassVar[Wants] = frozenset({"attention"})
    rewrites: ClassVar[bool] = True

    def first_score(self, view: CacheView) -> Tensor:
        """Return zeros: nobody has attended to a new token."""
        return torch.zeros_like(view.query_position, dtype=torch.float32)

    def shares(self, view: CacheView, t: int, alive: Tensor) -> Tensor:
        """Return how new token ``t`` shares its attention out among the slots it finds, averaged over heads, [B, S].

        Rows whose token does not run the layer get zeros.
        """
        assert view.attention is not None
        logits = view.attention[:, :, t, : alive.shape[1]].masked_fill(~alive[:, None], -torch.inf)
        return torch.nan_to_num(logits.softmax(-1)).mean(1) * view.ran[:, t : t + 1]
