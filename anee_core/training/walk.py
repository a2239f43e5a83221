"""Whole sequences on their way through layers that a gate may skip: what supervised training and REINFORCE share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anee_core.accounting.costs import CostModel
from anee_core.engine.whole_sequences import WholeSequences
from anee_core.interfaces.formulas import unit_norm


@dataclass(frozen=True)
class Visit:
    """One layer that may be skipped."""

    layer_idx: int
    """Index of the layer."""
    output: Tensor
    """[B, T, D] what the layer makes of the hidden states."""
    unit: Tensor
    """[B, T, D] hidden states in front of the layer, at unit norm."""


class Walk:
    """Sequences on their way from layer to layer. Layers that always run are run; at the others somebody decides.

    Args:
        sequences: token ids on their way.
        costs: what layers cost.
        free: which layers may be skipped.
        frozen: whether hidden states carry no gradients.
    """

    def __init__(self, sequences: WholeSequences, costs: CostModel, free: list[bool], frozen: bool = False) -> None:
        self._sequences, self._free, self._frozen = sequences, free, frozen
        self.hidden_states = sequences.embedded
        batch, tokens = self.hidden_states.shape[:2]
        self.positions = torch.arange(tokens, device=self.hidden_states.device)
        self.run_shares, self.skip_shares = costs.token_shares(self.positions)
        self.spent = torch.zeros(batch, tokens, device=self.hidden_states.device)
        """What each token has spent of a dense one's FLOPs, [B, T]."""

    def _graded(self) -> Any:
        return torch.set_grad_enabled(torch.is_grad_enabled() and not self._frozen)

    def visits(self) -> Iterator[Visit]:
        """Yield the layers that may be skipped, one after another; `go_on` has to be called for each."""
        for layer_idx, free in enumerate(self._free):
            with self._graded():
                output = self._sequences.layer(layer_idx, self.hidden_states)
                unit = unit_norm(self.hidden_states) if free else output
            if free:
                yield Visit(layer_idx, output, unit)
            else:
                self.hidden_states, self.spent = output, self.spent + self.run_shares[layer_idx]

    def go_on(self, visit: Visit, keep: Tensor, estimate: Tensor) -> None:
        """Run a layer for the tokens with ``keep`` [B, T], and add the ``estimate`` [B, T, D] to the others.

        ``keep`` is bool, or 0 and 1 with a gradient.
        """
        run, skip = self.run_shares[visit.layer_idx], self.skip_shares[visit.layer_idx]
        with self._graded():
            instead = self.hidden_states + estimate
            if keep.dtype == torch.bool:
                self.hidden_states = torch.where(keep[..., None], visit.output, instead)
                self.spent = self.spent + torch.where(keep, run, skip)
            else:
                share = keep[..., None].to(visit.unit.dtype)
                self.hidden_states = share * visit.output + (1 - share) * instead
                self.spent = self.spent + keep * run + (1 - keep) * skip

    def logits(self) -> Tensor:
        """Return logits [B, T, V] of the last layer's output."""
        with self._graded():
            return self._sequences.logits(self.hidden_states)
