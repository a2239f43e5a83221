"""The sparse sigmoid, alpha-entmax over a logit and zero (Peters et al., 2019, arXiv:1905.05702), and survival."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anee_core.errors import InputError

_NEAR_ONE = 1e-3
"""Closer to 1 than this, alpha is taken as 1: the difference is below what fp32 resolves."""
_GRID = 2048
_STEPS = 3
_STEEP = 4
_FLOOR = -1e4
"""What stands for the logarithm of zero: far enough that its exponential is zero, and finite, so sums of it are."""


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
    # By symmetry only the half with p <= 1/2 is solved.
    w = -v.abs()
    half = ((1 - w * w) / ((2 - w * w).sqrt() - w)).square() if alpha == 1.5 else _solve(w, a)
    return torch.where(v > 0, 1 - half, half)


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
    """Return p in [0, 1/2] with p^a - (1 - p)^a = w, for w in [-1, 0]."""
    if a > _STEEP:
        # Nearly a step: few logits are not saturated, and Newton's method would not find its way among them.
        p = torch.zeros_like(w)
        between = w > -1
        p[between] = _bisect(w[between].double(), a).float()
        return p
    # Solved once for a table, denser towards w = -1 where p may be steep; then two or three of Newton's steps.
    grid = torch.linspace(0, 1, _GRID + 1, dtype=torch.float64, device=w.device).square() - 1
    table = _bisect(grid, a).float()
    place = (w + 1).clamp(min=0).sqrt() * _GRID
    left = place.long().clamp(max=_GRID - 1)
    p = torch.lerp(table[left], table[left + 1], place - left)
    for _ in range(_STEPS):
        safe = p.clamp(min=1e-12)
        error = safe.pow(a) - (1 - safe).pow(a) - w
        p = (p - error / (a * (safe.pow(a - 1) + (1 - safe).pow(a - 1)))).clamp(0, 0.5)
    return torch.where(w <= -1, 0.0, p)


def _bisect(w: Tensor, a: float) -> Tensor:
    low, high = torch.zeros_like(w), torch.full_like(w, 0.5)
    for _ in range(52):
        middle = (low + high) / 2
        above = middle.pow(a) - (1 - middle).pow(a) > w
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return (low + high) / 2


class _LogSurvival(torch.autograd.Function):
    """Saves the probabilities only: they give the slope, and the sums are taken again."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, alpha: float) -> Tensor:
        p = sparse_sigmoid(logits, alpha)
        queries, keys = p.shape[-2:]
        later = torch.ones(queries, keys, dtype=torch.bool, device=p.device).tril(keys - queries - 1)
        p = torch.where(later, p, 1.0)
        ctx.alpha = alpha
        ctx.save_for_backward(p)
        return p.log().clamp(min=_FLOOR).cumsum(-2)

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
