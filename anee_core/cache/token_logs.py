"""What is known of each token of a sequence, recorded per token, so that a rollback needs no undoing."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor


class TokenLog:
    """Entries [B, tokens, ...] that grow with the sequence. Like the cache, they outlive inference mode."""

    fill: ClassVar[float] = 0.0
    """Value of entries that nothing was recorded in."""

    def __init__(self, entries: Tensor) -> None:
        self._entries = entries

    @torch.inference_mode(False)
    def reorder(self, rows: Tensor) -> None:
        """Make row i a copy of row ``rows[i]``."""
        self._entries = self._entries.index_select(0, rows.to(self._entries.device))

    def _reserve(self, length: int) -> None:
        """Have room for entries of ``length`` tokens."""
        held = self._entries.shape[1]
        if length > held:
            extra = max(held, length - held, 64)
            room = self._entries.new_full((self._entries.shape[0], extra, *self._entries.shape[2:]), self.fill)
            self._entries = torch.cat((self._entries, room), dim=1)


UNKNOWN = (1.0, 0.0)
"""Entropy and largest probability of a token that was drawn from no known distribution."""


class FeedbackLog(TokenLog):
    """For each token index an `Observation.feedback`, which policies may know when they decide on the token.

    That is entropy and largest probability of the distribution that it was drawn from, and the share of dense FLOPs
    that its sequence had spent before it. ``start`` tokens have been seen already, at a cost of ``budget`` each.
    """

    @torch.inference_mode(False)
    def __init__(self, batch: int, device: torch.device, start: int, budget: float) -> None:
        super().__init__(torch.tensor([*UNKNOWN, 0.0], device=device).repeat(batch, start + 1, 1))
        self._entries[..., 2] = budget * torch.arange(start + 1, device=device)

    def entry(self, index: int) -> Tensor:
        """Return the entry of a token, [B, 1, 3]."""
        return self._entries[:, index : index + 1]

    @torch.inference_mode(False)
    def record(self, index: int, spent: Tensor, distribution: Tensor, real: Tensor | None) -> None:
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


_PIECE = 256
"""Tokens that are compared at once: that bounds the memory for a long prompt."""


class ScoreLog(TokenLog):
    """Scores of tokens at each layer, [B, tokens, L] in fp32; NaN for tokens that no other is compared with.

    Args:
        batch: number of rows.
        layers: number of the model's layers.
        device: where the entries are.
        start: tokens that have been seen already; none is compared with them.
    """

    fill = torch.nan

    @torch.inference_mode(False)
    def __init__(self, batch: int, layers: int, device: torch.device, start: int) -> None:
        super().__init__(torch.full((batch, start + 1, layers), torch.nan, device=device))

    @torch.inference_mode(False)
    def compare(
        self, index: int, layer_idx: int, scores: Tensor, real: Tensor | None, window: int, tie: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Record the scores [B, T] of the tokens from ``index`` on; NaN, and padding, is compared with nothing later.

        Return how many of the ``window`` last tokens that a token is compared with have a lower score, and how many
        those are, both [B, T]. ``real`` [B, T] is False for padding; scores that differ by ``tie`` or less are equal.
        """
        end = index + scores.shape[1]
        kept = self.entries(end)[:, :end, layer_idx]
        scores = scores.detach().to(kept.device, torch.float32)
        kept[:, index:] = scores if real is None else scores.where(real, torch.nan)
        return compared(kept, scores, window, tie)

    @torch.inference_mode(False)
    def skip(self, index: int, tokens: int) -> None:
        """Let no token be compared with ``tokens`` tokens from ``index`` on."""
        self.entries(index + tokens)[:, index : index + tokens] = torch.nan

    @torch.inference_mode(False)
    def entries(self, length: int) -> Tensor:
        """Return the entries [B, S, L], with room for ``length`` tokens."""
        self._reserve(length)
        return self._entries


def compared(kept: Tensor, scores: Tensor, window: int, tie: float | Tensor = 0.0) -> tuple[Tensor, Tensor]:
    """Return how many of the tokens that a token is compared with have a lower score, and how many those are.

    Both are [B, T], for the last T tokens. Each is compared with the ``window`` last tokens before it that count: those
    whose score is not NaN.

    Args:
        kept: [B, S] scores of all tokens so far.
        scores: [B, T] of the last ones, whether they count or not.
        window: how many to compare with.
        tie: what two scores that are equal may differ by.
    """
    counts = ~kept.isnan()
    until = counts.cumsum(1)  # how many count, up to each token and with it
    first = kept.shape[1] - scores.shape[1]
    lower, among = [], []
    for start in range(0, scores.shape[1], _PIECE):
        own = scores[:, start : start + _PIECE]
        begin, end = first + start, first + start + own.shape[1]
        before = until[:, begin:end] - counts[:, begin:end].long()  # [B, t]
        place = torch.arange(begin, end, device=kept.device)[:, None]
        earlier = counts[:, None, :end] & (torch.arange(end, device=kept.device) < place)
        earlier = earlier & (until[:, None, :end] > before[..., None] - window)
        lower.append((earlier & (kept[:, None, :end] < own[..., None] - tie)).sum(-1))
        among.append(before.clamp(max=window))
    return torch.cat(lower, dim=1), torch.cat(among, dim=1)
