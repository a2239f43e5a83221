"""Ridge regressions from moments that are gathered piece by piece."""

from __future__ import annotations

import torch
from torch import Tensor


class Moments:
    """First and second moments of inputs x [N, D] and outputs y [N, E], gathered in fp64 piece by piece."""

    def __init__(self, inputs: int, outputs: int) -> None:
        self.count = 0
        self.x, self.y = torch.zeros(inputs, dtype=torch.float64), torch.zeros(outputs, dtype=torch.float64)
        self.xx = torch.zeros(inputs, inputs, dtype=torch.float64)
        self.xy = torch.zeros(inputs, outputs, dtype=torch.float64)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Take in some pairs."""
        x = x.double().cpu()
        self.count += x.shape[0]
        self.x += x.sum(0)
        self.xx += x.T @ x
        self.add_outputs(x, y)

    def add_outputs(self, x: Tensor, y: Tensor) -> None:
        """Take in outputs of inputs that were taken in before."""
        x, y = x.double().cpu(), y.double().cpu()
        self.y += y.sum(0)
        self.xy += x.T @ y

    def with_outputs(self, outputs: int) -> Moments:
        """Return the moments of the same inputs, ready for other outputs."""
        other = Moments(self.xx.shape[0], outputs)
        other.count, other.x, other.xx = self.count, self.x, self.xx
        return other

    def solve(self, ridge: float) -> tuple[Tensor, Tensor, Tensor]:
        """Return the ridge solution W [D, E] of centred pairs, its intercept [E], and the inputs' covariance [D, D]."""
        mean_x, mean_y = self.x / self.count, self.y / self.count
        covariance = self.xx / self.count - mean_x[:, None] * mean_x
        cross = self.xy / self.count - mean_x[:, None] * mean_y
        damped = covariance + ridge * covariance.diagonal().mean() * torch.eye(len(mean_x), dtype=torch.float64)
        weight = torch.linalg.solve(damped, cross)
        return weight, mean_y - mean_x @ weight, covariance

    def reduced(self, rank: int, ridge: float) -> tuple[Tensor, Tensor, Tensor]:
        """Return the ridge solution of the rank whose predictions lose the least, as ``down``, ``up`` and ``bias``.

        They are [r, D], [E, r] and [E] (reduced-rank regression; Izenman, 1975).
        """
        weight, _, covariance = self.solve(ridge)
        predicted = weight.T @ covariance @ weight
        _, vectors = torch.linalg.eigh(predicted)
        up = vectors[:, -min(rank, weight.shape[1]) :].flip(1)
        down = (weight @ up).T
        bias = (self.y - self.x @ weight @ up @ up.T) / self.count
        return down, up, bias
