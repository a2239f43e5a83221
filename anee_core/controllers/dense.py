"""Run every layer: the reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from anee_core.interfaces.controller import Action, Controller, DecisionContext


@dataclass(frozen=True)
class DenseController(Controller):
    """Run every layer for every token."""

    name: ClassVar[str] = "dense"

    @property
    def runs_all(self) -> bool:
        """Whether every layer runs: yes."""
        return True

    def decide(self, signals: Tensor, context: DecisionContext) -> Tensor:
        """Return PROCESS for all layers."""
        layers = context.num_layers - context.layer_idx
        return signals.new_full((layers, *signals.shape[:2]), Action.PROCESS, dtype=torch.uint8)
