"""What is trained: a module whose forward is the loss."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn


class Objective(nn.Module, ABC):
    """What is trained: a module whose forward is the loss."""

    def begin(self, step: int) -> None:
        """Set what changes with the step, before its forward."""

    @abstractmethod
    def forward(self, input_ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of token ids [B, T], a scalar, and figures to log."""

    def after(self, figures: dict[str, float]) -> None:
        """See the figures of a step, after it."""

    def adapted(self) -> dict[str, Tensor]:
        """Return what changes in training without a gradient, by name; it is kept with what is trained."""
        return dict(self.named_buffers(recurse=False))

    def validate(self) -> dict[str, float]:
        """Return figures of held-out text."""
        return {}
