"""What a decoder layer receives beside the hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class LayerCall:
    """What a decoder layer receives beside the hidden states."""

    position_ids: Tensor
    """[B, T] positions of the tokens."""
    position_embeddings: tuple[Tensor, Tensor] | None = None
    """Pair of rotary angles, for most families cosines and sines [B, T, Dh]; None where layers receive none."""
    attention_mask: Tensor | None = None
    """[B, 1, T, S] additive mask in the model's dtype; None where every held slot is visible."""

    def select(self, rows: Tensor, columns: Tensor) -> LayerCall:
        """Return the call for the tokens at ``rows`` x ``columns``, two index tensors that broadcast together."""
        embeddings = self.position_embeddings
        if embeddings is not None:
            embeddings = (embeddings[0][rows, columns], embeddings[1][rows, columns])
        return replace(
            self, position_ids=self.position_ids[rows, columns], position_embeddings=embeddings, attention_mask=None
        )

    def with_mask(self, attention_mask: Tensor | None) -> LayerCall:
        """Return the same call with another mask."""
        if attention_mask is None and self.attention_mask is None:
            return self
        return replace(self, attention_mask=attention_mask)

    @staticmethod
    def joined(calls: Sequence[LayerCall]) -> LayerCall:
        """Return one call for the tokens of several, side by side, without a mask."""
        if len(calls) == 1:
            return calls[0].with_mask(None)
        pairs = [call.position_embeddings for call in calls if call.position_embeddings is not None]
        cos, sin = (torch.cat([pair[i] for pair in pairs], dim=1) if pairs else None for i in range(2))
        return LayerCall(
            position_ids=torch.cat([call.position_ids for call in calls], dim=1),
            position_embeddings=None if cos is None or sin is None else (cos, sin),
        )

    def to(self, device: torch.device) -> LayerCall:
        """Return the call with its tensors on ``device``."""
        embeddings = self.position_embeddings
        mask = self.attention_mask
        return replace(
            self,
            position_ids=self.position_ids.to(device),
            position_embeddings=None if embeddings is None else (embeddings[0].to(device), embeddings[1].to(device)),
            attention_mask=None if mask is None else mask.to(device),
        )
