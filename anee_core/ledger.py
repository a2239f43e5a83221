"""Turns a controller's actions into what is executed: protected layers, exits and the budget."""

from __future__ import annotations

import torch
from torch import Tensor

from anee_core.accounting import CostModel
from anee_core.errors import BudgetError
from anee_core.interfaces import Action, LinearGate
from anee_core.layer_step import GateCall


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
            if limit < least:
                raise BudgetError(
                    f"a budget of {limit:g} cannot be met: the least possible is {least:.3f} "
                    f"(protected layers {sorted(protected) or 'none'}, and keys and values of the skipped ones); "
                    "raise the budget, or protect fewer layers if the policy lets you, as in 'protect=1 1'"
                )
        self.costs = costs
        self.always = torch.tensor([i in protected for i in range(costs.num_layers)])


def check_budget(limit: float) -> None:
    """Raise `BudgetError` unless ``limit`` lies in (0, 1]."""
    if isinstance(limit, bool) or not isinstance(limit, (int, float)) or not 0.0 < limit <= 1.0:
        raise BudgetError(f"budget is a share of the dense model's FLOPs, a number that lies in (0, 1]; got {limit!r}")


class Ledger:
    """What each token of one forward has spent so far, ``spent`` [B, T], and which tokens have exited."""

    def __init__(self, budget: Budget, position_ids: Tensor) -> None:
        self._budget = budget
        self._run_shares, self._skip_shares = budget.costs.token_shares(position_ids)
        self._always = budget.always.to(position_ids.device)[:, None, None]
        self.spent = torch.zeros_like(self._run_shares[0])
        self._exited = torch.zeros_like(position_ids, dtype=torch.bool)
        # What the layers wanted so far would cost, beside the least that a token can spend.
        self._wanted = torch.where(self._always, self._run_shares, self._skip_shares).sum(0)

    def settle(self, actions: Tensor, layer_idx: int) -> Tensor:
        """Return which tokens run each layer, [N, B, T] bool, and charge them for what is executed.

        ``actions`` [N, B, T] holds `Action` values for the layers from ``layer_idx`` on. After an EXIT a token skips
        all later layers. Protected layers run in any case. Under a hard budget the first wanted layer that cannot be
        paid for, with the least that the layers after it cost set aside, is skipped, and so are all later ones.
        """
        budget = self._budget
        span = slice(layer_idx, layer_idx + actions.shape[0])
        run_shares, skip_shares, always = self._run_shares[span], self._skip_shares[span], self._always[span]

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

    def gate(self, gate: LinearGate, shares: Tensor, scores: Tensor, seen: int) -> GateCall:
        """Return what a gate needs to settle all tokens by itself; see `GateCall`."""
        budget = self._budget
        return GateCall(
            gate=gate,
            shares=shares,
            scores=scores,
            seen=seen,
            run_shares=self._run_shares.contiguous(),
            skip_shares=self._skip_shares.contiguous(),
            wanted=self._wanted,
            always=self._always[:, 0, 0],
            limit=budget.limit if budget.hard and budget.limit is not None else torch.inf,
        )

    def charge(self, run: Tensor) -> None:
        """Charge the tokens for all layers, of which they ran those that ``run`` [L, B, T] says."""
        self.spent = torch.where(run.to(self.spent.device), self._run_shares, self._skip_shares).sum(0)
