"""Losses that several trainings share."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def divergence(wanted: Tensor, logits: Tensor) -> Tensor:
    """Return KL(wanted || logits) of two sets of next-token logits [B, T, V], in nats per token."""
    log_p, log_q = wanted.float().log_softmax(-1).flatten(0, 1), logits.float().log_softmax(-1).flatten(0, 1)
    return functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
