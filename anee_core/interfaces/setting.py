"""The model that a policy is about to serve, and what was measured on it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from anee_core.accounting.costs import CostModel


@dataclass(frozen=True)
class Calibration:
    """What was measured once on a model, for controllers to use.

    ``importance`` [L] is the rise in KL(dense || skipped), in nats per token, when one layer is skipped;
    ``confidence`` [Q] holds evenly spaced quantiles of the largest next-token probability.
    """

    importance: Tensor
    confidence: Tensor
    fingerprint: str
    source: str


@dataclass(frozen=True)
class Setting:
    """The model that a policy is about to serve: sizes, costs, budget and what calibration found.

    ``width`` is D, ``dtype`` and ``device`` are those of the model's weights. ``backbone`` is what the model's config
    says under ``anee_backbone``: the name of its very weights, for policies that were trained for them.
    """

    costs: CostModel
    budget: float | None = None
    hard: bool = False
    calibration: Calibration | None = None
    width: int = 0
    dtype: torch.dtype | None = None
    device: torch.device | None = None
    backbone: str | None = None

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return self.costs.num_layers
