"""Decisions and estimates as formulas, for steps that take all layers at once."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional
from typing_extensions import Self

TIE = 1e-4
"""Share of their spread by which scores may differ that count as equal. In another order of sums they do by 1e-5."""


@dataclass(frozen=True)
class LinearGate:
    """A controller's `decide` as a formula, in fp32.

    A token's score at a layer is ``weight`` times its hidden state at unit norm, plus ``bias``. Its rank is the share
    of the last ``window`` tokens with scores that are lower by more than `TIE` times ``spread``, where a normal
    distribution with ``mean`` and ``spread`` counts for ``prior`` further tokens. It skips the layer if its rank is
    below the share of tokens that are to skip it; a share below 0 says that it runs the layer and that no token is
    compared with it.
    """

    weight: Tensor
    """[L, D] weight of the scores."""
    bias: Tensor
    """[L] bias of the scores."""
    mean: Tensor
    """[L] mean of the normal distribution."""
    spread: Tensor
    """[L] standard deviation of the normal distribution."""
    prior: float
    """Number of tokens that the normal distribution counts for."""
    window: int
    """With how many earlier tokens a token is compared at most."""

    def to(self, device: torch.device) -> Self:
        """Return the gate with its tensors on a device."""
        tensors = {name: getattr(self, name).to(device) for name in ("weight", "bias", "mean", "spread")}
        return replace(self, **tensors)

    def score(self, unit: Tensor, layer_idx: int) -> Tensor:
        """Return the scores [...] at a layer of hidden states at unit norm [..., D] in fp32."""
        return unit @ self.weight[layer_idx].to(unit.device) + self.bias[layer_idx].to(unit.device)

    def rank(self, score: Tensor, lower: Tensor, compared: Tensor, layer_idx: int) -> Tensor:
        """Return the share of tokens with scores below ``score`` [...] at a layer.

        It counts ``lower`` [...] of the ``compared`` [...] ones, and for ``prior`` tokens what the normal distribution
        says.
        """
        mean, spread = (part[layer_idx].to(score.device) for part in (self.mean, self.spread))
        return ranks((score - mean) / spread, lower, compared, self.prior)


@dataclass(frozen=True)
class LinearInteraction:
    """A cache policy's formula: a token x keeps slot j while ``query x . key x_j / sqrt(r) + bias > 0``.

    Here x [D] is what a layer's attention gets of a token. What is dropped is hidden from the token's own attention,
    and a token that skips the layer drops nothing. A step that knows the formula can decide by itself, for one new
    token in each row.
    """

    query: Tensor
    """[L, r, D] projection of the token that decides."""
    key: Tensor
    """[L, r, D] projection of the tokens that it keeps or drops."""
    bias: Tensor
    """[L] bias of each layer."""
    state: str
    """Name under which ``key x_j`` is remembered."""


@dataclass(frozen=True)
class LowRankMap:
    """A shortcut's `estimate` as a formula: ``up @ down @ n(h) + bias`` of a hidden state h.

    Here n scales h to unit norm.
    """

    down: Tensor
    """[L, r, D] map from the hidden state to r numbers."""
    up: Tensor
    """[L, D, r] map from those to the estimate."""
    bias: Tensor
    """[L, D] bias of the estimate."""

    def estimate(self, layer_idx: int, hidden_states: Tensor) -> Tensor:
        """Return what a layer would add to hidden states [..., D], of the same shape."""
        down, up, bias = (part[layer_idx].to(hidden_states) for part in (self.down, self.up, self.bias))
        return functional.linear(unit_norm(hidden_states) @ down.T, up, bias)


def unit_norm(hidden_states: Tensor) -> Tensor:
    """Return hidden states [..., D] scaled to a root mean square of 1, in their dtype."""
    square = hidden_states.float().square().mean(-1, keepdim=True)
    return (hidden_states.float() * torch.rsqrt(square + 1e-6)).to(hidden_states.dtype)


def ranks(deviation: Tensor, lower: Tensor, compared: Tensor, prior: float) -> Tensor:
    """Return the share [...] of tokens with lower scores.

    It counts ``lower`` [...] of the ``compared`` [...] ones, and for ``prior`` tokens what a normal distribution says
    of scores by their ``deviation`` [...], in standard deviations.
    """
    return (lower + prior * torch.special.ndtr(deviation)) / (compared + prior)
