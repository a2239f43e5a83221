"""Sums over a sequence's tokens, layer by layer."""

from __future__ import annotations

import torch
from torch import Tensor

from anee_core.token_log import TokenLog


class TallyLog(TokenLog):
    """For each token index and layer, what a controller has summed up over the tokens before it.

    Args:
        batch: rows.
        layers: of the model.
        width: numbers per layer.
        device: where they are.
        start: tokens that have been seen already; they count nothing.
    """

    @torch.inference_mode(False)
    def __init__(self, batch: int, layers: int, width: int, device: torch.device, start: int) -> None:
        super().__init__(torch.zeros(batch, start + 1, layers, width, dtype=torch.float64, device=device))

    @torch.inference_mode(False)
    def before(self, index: int, layer_idx: int, amounts: Tensor, real: Tensor | None) -> Tensor:
        """Record what the tokens from ``index`` on add, [B, T, K], and return the sums before each, [B, T, K].

        ``real`` [B, T] is False for padding, which adds nothing.
        """
        added = amounts.detach().double()
        if real is not None:
            added = added * real[..., None]
        start = self._entries[:, index : index + 1, layer_idx]
        sums = torch.cat((start, start + added.to(start.device).cumsum(1)), dim=1)
        self._reserve(index + sums.shape[1])
        self._entries[:, index : index + sums.shape[1], layer_idx] = sums
        return sums[:, :-1].to(amounts.device)

    @torch.inference_mode(False)
    def carry(self, index: int, tokens: int) -> None:
        """Let ``tokens`` tokens from ``index`` on count nothing, in all layers."""
        self._reserve(index + tokens + 1)
        self._entries[:, index + 1 : index + tokens + 1] = self._entries[:, index : index + 1]

    def at(self, index: int) -> Tensor:
        """Return the sums over the tokens before token ``index``, [B, L, K]."""
        return self._entries[:, index].contiguous()

    @torch.inference_mode(False)
    def put(self, index: int, sums: Tensor) -> None:
        """Record the sums [B, L, K] over token ``index`` and those before it."""
        self._reserve(index + 2)
        self._entries[:, index + 1] = sums
