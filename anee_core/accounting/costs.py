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
    """The cost of each part of one model."""

    run: tuple[Work, ...]
    """Work of each layer's linears, where a token runs it; attention comes on top, by ``pair_flops``."""
    propagate: tuple[Work, ...]
    """Work of giving a token that skips a layer its keys and values there, for each layer."""
    pair_flops: int
    """FLOPs that attention adds in a layer for each pair of a query and a slot."""
    head: Work
    """Work of the language-model head."""
    embedding: Work
    """Work of what leads from a token to the first layer, and from the last layer to the head."""
    slot_flops: int = 0
    """FLOPs that a call of a layer adds for each slot of a row, however many tokens it has: of families whose cache
    holds less than keys and values."""
    shortcut: tuple[Work, ...] = ()
    """Work of the shortcut that a token gets in the place of a skipped layer, for each layer; empty for none."""

    @property
    def skip(self) -> tuple[Work, ...]:
        """Work of skipping each layer: keys and values, and the shortcut if there is one."""
        if not self.shortcut:
            return self.propagate
        return tuple(keys + instead for keys, instead in zip(self.propagate, self.shortcut, strict=True))

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.run)

    def token_shares(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the shares of a dense token's layer FLOPs that running and that skipping each layer take.

        Both are [L, ...] in fp32 for ``position_ids`` [...]: attention grows with the number of tokens before. A token
        is taken to come alone, as in decoding.
        """
        attention = (self.pair_flops + self.slot_flops) * (position_ids + 1).float()
        run, skip = self._flops.to(position_ids.device).view(2, self.num_layers, *[1] * position_ids.dim())
        run = run + attention
        dense = run.sum(0)
        return run / dense, skip / dense

    def saved_more(self, position_ids: Tensor) -> Tensor:
        """Return the factor [...] by which skipping at ``position_ids`` [...] saves more than constant shares say.

        Those are `run_shares` and `skip_shares`, which leave attention out. A skipped layer saves its attention too, so
        the share of a dense token's decoder-layer FLOPs that is saved grows with the position.
        """
        _, skip = self.token_shares(position_ids)
        return (1 - skip.sum(0)) / (1 - sum(self.skip_shares))

    def spent_shares(self, ran: Tensor) -> Tensor:
        """Return what each token spends of a dense token's decoder-layer FLOPs, [B, T].

        ``ran`` [L, B, T] says which layers it ran; it skipped the others. Sequences start at position 0.
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
