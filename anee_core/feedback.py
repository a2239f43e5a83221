"""What a policy may know of a sequence's own output."""

from __future__ import annotations

import torch
from torch import Tensor

from anee_core.token_log import TokenLog

UNKNOWN = (1.0, 0.0)
"""Entropy and largest probability of a token that was drawn from no known distribution."""


class FeedbackLog(TokenLog):
    """For each token index: entropy and largest probability of the distribution it was drawn from, and the share of
    dense FLOPs its sequence had spent before it. Entries are `Observation.feedback`.

    ``start`` tokens have been seen already, at a cost of ``budget`` each.
    """

    @torch.inference_mode(False)
    def __init__(self, batch: int, device: torch.device, start: int, budget: float) -> None:
        super().__init__(torch.tensor([*UNKNOWN, 0.0], device=device).repeat(batch, start + 1, 1))
        self._entries[..., 2] = budget * torch.arange(start + 1, device=device)

    def at(self, index: int) -> Tensor:
        """Return the entry of a token, [B, 1, 3]."""
        return self._entries[:, index : index + 1]

    @torch.inference_mode(False)
    def note(self, index: int, spent: Tensor, distribution: Tensor, real: Tensor | None) -> None:
        """Record a block of tokens from ``index`` on.

        ``spent`` [B, T] is what each cost, ``distribution`` [B, 2] entropy and largest probability after each row's
        last real token; ``real`` [B, T] is False for padding. A row without a real token keeps what it had.
        """
        tokens = spent.shape[1]
        before = self._entries[:, index]
        costs = spent if real is None else spent * real
        some = torch.ones_like(before[:, :1], dtype=torch.bool) if real is None else real.any(1, keepdim=True)
        block = self._entries.new_tensor([*UNKNOWN, 0.0]).repeat(spent.shape[0], tokens, 1)
        block[..., 2] = before[:, 2:] + costs.cumsum(1)
        block[:, -1, :2] = torch.where(some, distribution.detach(), before[:, :2])
        end = index + 1 + tokens
        self._reserve(end)
        self._entries[:, index + 1 : end] = block
