"""Scores of a sequence's tokens at each layer, and how a token's compares with those of the tokens before it."""

from __future__ import annotations

import torch
from torch import Tensor

from anee_core.token_log import TokenLog

_PIECE = 256
"""Tokens that are compared at once: that bounds the memory for a long prompt."""


class ScoreLog(TokenLog):
    """Entries [B, tokens, L] in fp32; NaN for tokens that no other is compared with.

    Args:
        batch: rows.
        layers: of the model.
        device: where they are.
        start: tokens that have been seen already; none is compared with them.
    """

    fill = torch.nan

    @torch.inference_mode(False)
    def __init__(self, batch: int, layers: int, device: torch.device, start: int) -> None:
        super().__init__(torch.full((batch, start + 1, layers), torch.nan, device=device))

    @torch.inference_mode(False)
    def compare(
        self, index: int, layer_idx: int, scores: Tensor, real: Tensor | None, window: int
    ) -> tuple[Tensor, Tensor]:
        """Record the scores [B, T] of the tokens from ``index`` on; NaN, and padding, is compared with nothing later.

        Return how many of the ``window`` last tokens that a token is compared with have a lower score, and how many
        those are, both [B, T]. ``real`` [B, T] is False for padding.
        """
        tokens = scores.shape[1]
        kept = self.room(index + tokens)[:, : index + tokens, layer_idx]
        scores = scores.detach().to(kept.device, torch.float32)
        kept[:, index:] = scores if real is None else scores.where(real, torch.nan)
        return compared(kept, scores, window)

    @torch.inference_mode(False)
    def skip(self, index: int, tokens: int) -> None:
        """Let no token be compared with ``tokens`` tokens from ``index`` on."""
        self.room(index + tokens)[:, index : index + tokens] = torch.nan

    @torch.inference_mode(False)
    def room(self, length: int) -> Tensor:
        """Return the entries [B, S, L], with room for ``length`` tokens."""
        self._reserve(length)
        return self._entries


def compared(kept: Tensor, scores: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Return of each of the last T tokens how many of the ``window`` ones before it that count, and are not NaN, have a
    lower score, and how many those are, both [B, T].

    Args:
        kept: [B, S] scores of all tokens so far.
        scores: [B, T] of the last ones, whether they count or not.
        window: how many to compare with.
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
        lower.append((earlier & (kept[:, None, :end] < own[..., None])).sum(-1))
        among.append(before.clamp(max=window))
    return torch.cat(lower, dim=1), torch.cat(among, dim=1)
