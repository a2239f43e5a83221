"""The sparse sigmoid, alpha-entmax over a logit and zero (Peters et al., 2019, arXiv:1905.05702), and survival."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anee_core.errors import InputError

_NEAR_ONE = 1e-3
"""Closer to 1 than this, alpha is taken as 1: the difference is below what fp32 resolves."""
_GRID = 4096
_STEPS = 2
_STEEP = 4
_FLOOR = -1e4
"""What stands for the logarithm of zero: far enough that its exponential is zero, and finite, so sums of it are."""
_GONE = -40.0
"""A logarithm below this is zero's: fp32 does not see e^-40 beside a token's own weight, but attention weights so small
are subnormal numbers, which take matrix products ten times as long.
"""


def sparse_sigmoid(logits: Tensor, alpha: float) -> Tensor:
    """Return p in [0, 1] of the same shape, in fp32: the first entry of alpha-entmax([logit, 0]).

    With a = alpha - 1, p solves p^a - (1 - p)^a = a z. It is exactly 1 from z = 1/a on and exactly 0 up to -1/a.
    ``alpha`` = 1 is the logistic function, 2 a ramp, infinity a step that is 1 above zero. It carries no
    gradient; see `log_survival`.

    Raises:
        InputError: alpha is below 1.
    """
    z = logits.detach().float()
    if not alpha >= 1:
        raise InputError(f"alpha is at least 1; got {alpha:g}")
    if alpha == float("inf"):
        return (z > 0).float()
    a = alpha - 1
    if a < _NEAR_ONE:
        return z.sigmoid()
    v = (a * z).clamp(-1, 1)
    if alpha == 2:
        return (v + 1) / 2
    p = (v > 0).float()
    # Most logits are saturated once training has sharpened them; the rest is solved in the half with p <= 1/2.
    between = v.abs() < 1
    free = v[between]
    w = -free.abs()
    half = ((1 - w * w) / ((2 - w * w).sqrt() - w)).square() if alpha == 1.5 else _solve(w, a)
    p[between] = torch.where(free > 0, 1 - half, half)
    return p


def slope(p: Tensor, alpha: float) -> Tensor:
    """Return the derivative of the sparse sigmoid where its value is ``p``; zero where it is saturated."""
    a = alpha - 1
    if alpha == float("inf"):
        return torch.zeros_like(p)
    if a < _NEAR_ONE:
        return p * (1 - p)
    free = (p > 0) & (p < 1)
    safe = torch.where(free, p, 0.5)
    return free / (safe.pow(a - 1) + (1 - safe).pow(a - 1))


def _solve(w: Tensor, a: float) -> Tensor:
    """Return p in [0, 1/2] with p^a - (1 - p)^a = w, for w in (-1, 0]: from a table, and by Newton's method."""
    grid = torch.linspace(0, 1, _GRID + 1, dtype=torch.float64, device=w.device)
    if a > _STEEP:
        # Nearly a step: p bends next to w = 0, where the table is dense, and Newton's method would lose its way.
        table = _bisect(-grid.pow(4), a).float()
        return _look_up(table, (-w).sqrt().sqrt())
    # For small a, p bends next to w = -1.
    p = _look_up(_bisect(grid.square() - 1, a).float(), (w + 1).sqrt())
    for _ in range(_STEPS):
        safe = p.clamp(min=1e-12)
        low, high = safe.pow(a - 1), (1 - safe).pow(a - 1)
        p = (p - (safe * low - (1 - safe) * high - w) / (a * (low + high))).clamp(0, 0.5)
    return p


def _look_up(table: Tensor, place: Tensor) -> Tensor:
    """Return what lies at ``place`` in [0, 1] of a table."""
    place = place * (len(table) - 1)
    left = place.long().clamp(max=len(table) - 2)
    return torch.lerp(table[left], table[left + 1], place - left)


def _bisect(w: Tensor, a: float) -> Tensor:
    low, high = torch.zeros_like(w), torch.full_like(w, 0.5)
    for _ in range(52):
        middle = (low + high) / 2
        above = middle.pow(a) - (1 - middle).pow(a) > w
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return (low + high) / 2


class _LogSurvival(torch.autograd.Function):
    """Logarithm of survival. Only probabilities are saved: they give the slope, and the sums are taken again."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, alpha: float) -> Tensor:
        queries, keys = logits.shape[-2:]
        later = torch.ones(queries, keys, dtype=torch.bool, device=logits.device).tril(keys - queries - 1)
        # A pair that is not droppable has a logit beyond saturation.
        p = sparse_sigmoid(torch.where(later, logits, torch.inf), alpha)
        ctx.alpha = alpha
        ctx.save_for_backward(p)
        left = p.log().clamp(min=_FLOOR).cumsum(-2)
        return left.masked_fill_(left < _GONE, _FLOOR)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (p,) = ctx.saved_tensors
        grad = grads[0]
        # The sum over all later queries.
        total = grad.flip(-2).cumsum(-2).flip(-2)
        return total * slope(p, ctx.alpha) / p.clamp(min=1e-12), None


def log_survival(logits: Tensor, alpha: float) -> Tensor:
    """Return the logarithm of how much of each token is left for each query, [..., T, S], in fp32.

    ``logits`` [..., T, S] say by how much query i wants to keep slot j; the last T slots are the queries' own. What is
    left for query i is the product of the sparse sigmoids of all queries from the slot's own (not included) to i. A
    token never drops itself nor one after it. Where nothing is left the logarithm is a large negative number.
    """
    result: Tensor = _LogSurvival.apply(logits, alpha)  # type: ignore[no-untyped-call]
    return result
