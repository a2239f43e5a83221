"""Decisions and estimates as formulas, for steps that take all layers at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LinearGate:
    """A controller's `decide` as a formula, for steps that take all layers at once.

    A token's score at a layer is ``weight`` [L, D] times its hidden state at unit norm, plus ``bias`` [L]. Its rank is
    the share of the last ``window`` tokens with lower scores, where a normal distribution with ``mean`` [L] and
    ``spread`` [L] counts for ``prior`` further tokens. It skips the layer if its rank is below the share of tokens that
    are to skip it; a share below 0 says that it runs the layer and that no token is compared with it. All in fp32.
    """

    weight: Tensor
    bias: Tensor
    mean: Tensor
    spread: Tensor
    prior: float
    window: int


@dataclass(frozen=True)
class LinearInteraction:
    """The formula of a cache policy whose tokens keep a slot j while ``query x . key x_j / sqrt(r) + bias > 0``, where
    x [D] is what a layer's attention gets of each; ``query`` and ``key`` are [L, r, D], ``bias`` is [L].

    What is dropped is hidden from the token's own attention, and a token that skips the layer drops nothing. ``state``
    is the name under which ``key x_j`` is remembered. A step that knows the formula can decide by itself, for one new
    token in each row.
    """

    query: Tensor
    key: Tensor
    bias: Tensor
    state: str


def unit_norm(hidden_states: Tensor) -> Tensor:
    """Return hidden states [..., D] scaled to a root mean square of 1, in their dtype."""
    square = hidden_states.float().square().mean(-1, keepdim=True)
    return (hidden_states.float() * torch.rsqrt(square + 1e-6)).to(hidden_states.dtype)


def ranks(score: Tensor, lower: Tensor, compared: Tensor, mean: Tensor, spread: Tensor, prior: float) -> Tensor:
    """Return the share [B, T] of tokens with scores below ``score`` [B, T]: ``lower`` of the ``compared`` ones, and for
    ``prior`` tokens what a normal distribution says.
    """
    below = torch.special.ndtr((score - mean) / spread)
    return (lower + prior * below) / (compared + prior)
