"""The limit on what a token may spend."""

from __future__ import annotations

import math

import torch

from anee_core.accounting.costs import CostModel
from anee_core.errors import BudgetError

SLACK = 1e-6
"""What a share may exceed a limit by, which is rounding."""


class Budget:
    """The limit on what a token may spend, as a share of a dense token's decoder-layer FLOPs.

    Args:
        costs: what each layer costs run and skipped.
        protected: layers that always run.
        limit: the budget in (0, 1], or None for none.
        hard: whether no token may exceed it; otherwise it binds on average, which is the controller's work.

    Raises:
        BudgetError: the limit is out of range, or below what protected layers and skipped layers' keys and values cost.
    """

    def __init__(self, costs: CostModel, protected: frozenset[int], limit: float | None, hard: bool) -> None:
        self.limit, self.hard, self.protected = limit, hard, protected
        if limit is not None:
            check_budget(limit)
            least = costs.least_share(tuple(protected))
            if limit < least - SLACK:  # one that trained weights keep is in single precision
                raise BudgetError(
                    f"a budget of {limit:g} cannot be met: the least possible is {math.ceil(least * 1000) / 1000:.3f} "
                    f"(protected layers {sorted(protected) or 'none'}, and keys and values of the skipped ones); "
                    "raise the budget, or protect fewer layers if the policy lets you, as in 'protect=1 1'",
                    least,
                )
        self.costs = costs
        self.always = torch.tensor([i in protected for i in range(costs.num_layers)])


def check_budget(limit: float) -> None:
    """Raise `BudgetError` unless ``limit`` lies in (0, 1]."""
    if isinstance(limit, bool) or not isinstance(limit, (int, float)) or not 0.0 < limit <= 1.0:
        raise BudgetError(f"budget is a share of the dense model's FLOPs, a number that lies in (0, 1]; got {limit!r}")
