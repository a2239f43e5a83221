"""How far next-token distributions are apart."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

_PIECE = 64
"""Tokens that are compared at once: what is computed on the way is as large as their logits, and memory by the hundred
megabytes is slow to get.
"""


def divergences(wanted: Tensor, logits: Tensor) -> Tensor:
    """Return KL(wanted || logits) of next-token logits [B, T, V], in nats, of each token, [B, T]."""
    pieces = zip(torch.split(wanted.flatten(0, -2), _PIECE), torch.split(logits.flatten(0, -2), _PIECE), strict=True)
    return torch.cat([_divergences(*piece) for piece in pieces]).view(logits.shape[:-1])


def _divergences(wanted: Tensor, logits: Tensor) -> Tensor:
    log_p, log_q = wanted.float().log_softmax(-1), logits.float().log_softmax(-1)
    return functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def divergence(wanted: Tensor, logits: Tensor) -> Tensor:
    """Return the mean of `divergences`."""
    return divergences(wanted, logits).mean()


def losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy of next-token logits [B, T, V] with token ids [B, T], in nats, of each token, [B, T]."""
    pieces = zip(torch.split(logits.flatten(0, -2), _PIECE), torch.split(targets.flatten(), _PIECE), strict=True)
    found = [functional.cross_entropy(piece.float(), ids, reduction="none") for piece, ids in pieces]
    return torch.cat(found).view(targets.shape)
