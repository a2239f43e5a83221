"""Turns a controller's actions into what is executed: protected layers, exits and the budget."""

from __future__ import annotations

import torch
from torch import Tensor

from anee_core.accounting import CostModel
from anee_core.errors import BudgetError
from anee_core.interfaces import Action


class Budget:
    """Shares of a dense token's decoder-layer FLOPs, per layer, and the limit on their sum.

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
            if limit < least:
                raise BudgetError(
                    f"a budget of {limit:g} cannot be met: the least possible is {least:.3f} "
                    f"(protected layers {sorted(protected) or 'none'}, and keys and values of the skipped ones)"
                )
        self.least = costs.least_share(tuple(protected))
        self.run_shares, self.skip_shares = torch.tensor(costs.run_shares), torch.tensor(costs.skip_shares)
        self.always = torch.tensor([i in protected for i in range(costs.num_layers)])


def check_budget(limit: float) -> None:
    """Raise `BudgetError` unless ``limit`` lies in (0, 1]."""
    if not 0.0 < limit <= 1.0:
        raise BudgetError(f"budget is a share of the dense model's FLOPs and lies in (0, 1]; got {limit:g}")


class Ledger:
    """What each token of one forward has spent so far, ``spent`` [B, T], and which tokens have exited."""

    def __init__(self, budget: Budget, batch: int, tokens: int, device: torch.device) -> None:
        self._budget = budget
        self.spent = torch.zeros(batch, tokens, device=device)
        self._exited = torch.zeros(batch, tokens, dtype=torch.bool, device=device)
        # What the layers wanted so far would cost beyond the least a token can spend.
        self._wanted = torch.full_like(self.spent, budget.least)

    def settle(self, actions: Tensor, layer_idx: int) -> Tensor:
        """Return which tokens run each layer, [N, B, T] bool, and charge them for what is executed.

        ``actions`` [N, B, T] holds `Action` values for the layers from ``layer_idx`` on. After an EXIT a token skips
        all later layers. Protected layers run in any case. Under a hard budget the first wanted layer that cannot be
        paid for, with the least that the layers after it cost set aside, is skipped, and so are all later ones.
        """
        budget, device = self._budget, actions.device
        span = slice(layer_idx, layer_idx + actions.shape[0])
        run_shares = budget.run_shares[span].to(device)[:, None, None]
        skip_shares = budget.skip_shares[span].to(device)[:, None, None]
        always = budget.always[span].to(device)[:, None, None]

        exited = self._exited | ((actions == Action.EXIT).cumsum(0) > 0)
        run = (actions == Action.PROCESS) & ~exited
        self._exited = exited[-1]
        if budget.hard and budget.limit is not None:
            extra = (run & ~always) * (run_shares - skip_shares)
            wanted = self._wanted + extra.cumsum(0)
            run = run & (wanted <= budget.limit + 1e-6)
            self._wanted = wanted[-1]
        run = run | always
        self.spent = self.spent + torch.where(run, run_shares, skip_shares).sum(0)
        return run
