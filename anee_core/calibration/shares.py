"""Solve for the share of tokens that skips each layer, so that a budget is spent: spending is linear in the shares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from anee_core.accounting.costs import CostModel
from anee_core.controllers.gate import GateWeights

BUDGETS = tuple(round(0.3 + 0.05 * i, 2) for i in range(14))
"""Budgets from 0.3 to 0.95 that have shares; the first may be out of reach, and 1 is always there."""
_CLOSE = 0.002
_HALVINGS = 50


def from_one_score(gate: GateWeights, costs: CostModel, protected: frozenset[int]) -> GateWeights:
    """Return a gate whose shares follow from one score for all layers, below which every token skips.

    Scores are taken as normally distributed on the text of the fit.
    """
    low = float((gate.mean - 9 * gate.spread).min())
    high = float((gate.mean + 9 * gate.spread).max())

    def shares(score: float) -> Tensor:
        return torch.special.ndtr((score - gate.mean) / gate.spread)

    return _solved(gate, costs, protected, lambda budget: shares, (low, high))


def from_trained(
    gate: GateWeights,
    costs: CostModel,
    protected: frozenset[int],
    beyond: Callable[[float], float] = lambda budget: 0.0,
) -> GateWeights:
    """Return a gate with its shares moved, those of each budget together, until that budget is spent.

    On text a layer is not skipped by quite its share of the tokens, since scores drift along a sequence. What is spent
    ``beyond`` a budget because of that is held back.
    """

    def moved(budget: float) -> Callable[[float], Tensor]:
        logits = gate.shares_at(torch.tensor(budget)).clamp(1e-6, 1 - 1e-6).logit()
        return lambda by: (logits + by).sigmoid()

    return _solved(gate, costs, protected, moved, (-30.0, 30.0), beyond)


def spent(shares: Tensor, costs: CostModel) -> float:
    """Return the share of a dense token's FLOPs that is spent if tokens skip each layer with ``shares`` [L]."""
    run, skip = torch.tensor(costs.run_shares), torch.tensor(costs.skip_shares)
    return float((run * (1 - shares) + skip * shares).sum())


def _solved(
    gate: GateWeights,
    costs: CostModel,
    protected: frozenset[int],
    shares_for: Callable[[float], Callable[[float], Tensor]],
    between: tuple[float, float],
    beyond: Callable[[float], float] = lambda budget: 0.0,
) -> GateWeights:
    """Return a gate with shares for the budgets within reach, for the least possible one, and for 1.

    ``shares_for`` a budget gives the shares [L] of a number that lies ``between`` two others; they rise with it.
    """
    free = torch.tensor([float(i not in protected) for i in range(costs.num_layers)])
    least = costs.least_share(sorted(protected))
    reached = [budget for budget in BUDGETS if budget > least + _CLOSE]
    rows = [free]
    for budget in reached:
        shares, (low, high), aim = shares_for(budget), between, budget - beyond(budget)
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            over = spent(shares(middle) * free, costs) > aim
            low, high = (middle, high) if over else (low, middle)
        rows.append(shares(high) * free)
    rows.append(torch.zeros_like(free))
    return replace(gate, budgets=torch.tensor([least, *reached, 1.0]), shares=torch.stack(rows))
