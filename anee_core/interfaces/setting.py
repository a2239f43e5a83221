"""The model that a policy is about to serve, and what was measured on it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from anee_core.accounting.costs import CostModel


@dataclass(frozen=True)
class Calibration:
    """What was measured once on a model, for controllers to use."""

    importance: Tensor
    """[L] rise in KL(dense || skipped), in nats per token, when one layer is skipped."""
    confidence: Tensor
    """[Q] evenly spaced quantiles of the largest next-token probability."""
    fingerprint: str
    """Hash that tells the model apart from others."""
    source: str
    """What was read: "own samples", or a hash of the text."""


@dataclass(frozen=True)
class Setting:
    """The model that a policy is about to serve: sizes, costs, budget and what calibration found."""

    costs: CostModel
    """What the model's parts cost."""
    budget: float | None = None
    """Share of the dense decoder-layer FLOPs that may be spent; None for no budget."""
    hard: bool = False
    """Whether no token may exceed the budget; otherwise it holds on average."""
    calibration: Calibration | None = None
    """What was measured on the model; None if nothing was."""
    width: int = 0
    """Width D of the hidden states."""
    dtype: torch.dtype | None = None
    """Type of the model's weights."""
    device: torch.device | None = None
    """Device of the model's weights; of the first ones, if there are several."""
    backbone: str | None = None
    """What the model's config says under ``anee_backbone``: the name of its very weights, for policies that were
    trained for them.
    """

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return self.costs.num_layers
