"""How far next-token distributions are apart."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def divergences(wanted: Tensor, logits: Tensor) -> Tensor:
    """Return KL(wanted || logits) of next-token logits [B, T, V], in nats, of each token, [B, T]."""
    log_p, log_q = wanted.float().log_softmax(-1), logits.float().log_softmax(-1)
    return functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def divergence(wanted: Tensor, logits: Tensor) -> Tensor:
    """Return the mean of `divergences`."""
    return divergences(wanted, logits).mean()
