"""What each part of one model costs, as FLOPs and bytes, and as shares of a dense token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from anee_core.accounting.work import Work


@dataclass(frozen=True)
class CostModel:
    """What each part of one model costs.

    ``run`` and ``propagate`` hold one `Work` per layer: the layer's linears, and what gives a skipped token its keys
    and values; ``shortcut`` what it gets in the layer's place, if anything. Attention adds ``pair_flops`` for each
    (query, slot) pair. Head and embedding stand apart; the latter is what leads from a token to the first layer, and
    from the last layer to the head.
    """

    run: tuple[Work, ...]
    propagate: tuple[Work, ...]
    pair_flops: int
    head: Work
    embedding: Work
    shortcut: tuple[Work, ...] = ()

    @property
    def skip(self) -> tuple[Work, ...]:
        """What skipping each layer takes."""
        if not self.shortcut:
            return self.propagate
        return tuple(keys + instead for keys, instead in zip(self.propagate, self.shortcut, strict=True))

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.run)

    def token_shares(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return what running and what skipping each layer takes of a dense token's decoder-layer FLOPs, both
        [L, ...] in fp32 for ``position_ids`` [...]: attention grows with the number of tokens before.
        """
        attention = self.pair_flops * (position_ids + 1).float()
        run, skip = self._flops.to(position_ids.device).view(2, self.num_layers, *[1] * position_ids.dim())
        run = run + attention
        dense = run.sum(0)
        return run / dense, skip / dense

    def saved_more(self, position_ids: Tensor) -> Tensor:
        """Return the factor [...] by which skipping saves a larger share of a dense token's decoder-layer FLOPs at
        ``position_ids`` [...] than `run_shares` and `skip_shares` say, since it saves attention too.
        """
        _, skip = self.token_shares(position_ids)
        return (1 - skip.sum(0)) / (1 - sum(self.skip_shares))

    def spent_shares(self, ran: Tensor) -> Tensor:
        """Return what each token of sequences that start at position 0 spends of a dense one's decoder-layer FLOPs,
        [B, T], if it ran the layers ``ran`` [L, B, T] and skipped the others.
        """
        run, skip = self.token_shares(torch.arange(ran.shape[2], device=ran.device))
        return torch.where(ran, run[:, None], skip[:, None]).sum(0)

    @cached_property
    def _flops(self) -> Tensor:
        """FLOPs per token of running and of skipping each layer, [2, L]."""
        return torch.tensor([[float(work.flops) for work in parts] for parts in (self.run, self.skip)])

    @property
    def run_shares(self) -> tuple[float, ...]:
        """Share of a dense token's decoder-layer FLOPs that running each layer takes, attention left out.

        Attention makes a run layer dearer and a skipped one no dearer, so a plan that meets a budget by these shares
        meets it at every context length.
        """
        dense = sum(work.flops for work in self.run)
        return tuple(work.flops / dense for work in self.run)

    @property
    def skip_shares(self) -> tuple[float, ...]:
        """Share of a dense token's decoder-layer FLOPs that skipping each layer still takes, attention left out."""
        dense = sum(work.flops for work in self.run)
        return tuple(work.flops / dense for work in self.skip)

    def least_share(self, protected: Sequence[int]) -> float:
        """Return the smallest share a token can spend when ``protected`` layers always run."""
        keep = set(protected)
        return sum(
            r if i in keep else s for i, (r, s) in enumerate(zip(self.run_shares, self.skip_shares, strict=True))
        )
