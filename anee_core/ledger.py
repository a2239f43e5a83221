"""Turns a controller's actions into what is executed: protected layers, exits and the budget."""

from __future__ import annotations

import math
from functools import cached_property

import torch
from torch import Tensor

from anee_core.accounting import CostModel
from anee_core.errors import BudgetError
from anee_core.interfaces import Action, LinearGate
from anee_core.layer_step import GateCall, Limit


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
                    f"a budget of {limit:g} cannot be met: the least possible is {math.ceil(least * 1000) / 1000:.3f} "
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
    """What each token of one forward has spent so far, ``spent`` [B, T], and which tokens have exited. Whatever nobody
    asks for is not worked out.
    """

    def __init__(self, budget: Budget, position_ids: Tensor) -> None:
        self._budget, self._position_ids = budget, position_ids
        self._limit = budget.limit if budget.hard and budget.limit is not None else None

    @cached_property
    def _shares(self) -> tuple[Tensor, Tensor]:
        """What running and what skipping each layer takes of a dense token, both [L, B, T]."""
        return self._budget.costs.token_shares(self._position_ids)

    @cached_property
    def _always(self) -> Tensor:
        """Which layers always run, [L, 1, 1]."""
        return self._budget.always.to(self._position_ids.device)[:, None, None]

    @cached_property
    def _wanted(self) -> Tensor:
        """What the layers wanted so far would cost, beside the least that a token can spend, [B, T]."""
        return torch.where(self._always, *self._shares).sum(0)

    @cached_property
    def spent(self) -> Tensor:
        """Share of a dense token's layer FLOPs that each token has spent, [B, T]."""
        return torch.zeros_like(self._shares[0][0])

    @cached_property
    def _exited(self) -> Tensor:
        """Which tokens have exited, [B, T]."""
        return torch.zeros_like(self._position_ids, dtype=torch.bool)

    def settle(self, actions: Tensor, layer_idx: int) -> Tensor:
        """Return which tokens run each layer, [N, B, T] bool, and charge them for what is executed.

        ``actions`` [N, B, T] holds `Action` values for the layers from ``layer_idx`` on. After an EXIT a token skips
        all later layers. Protected layers run in any case. Under a hard budget the first wanted layer that cannot be
        paid for, with the least that the layers after it cost set aside, is skipped, and so are all later ones.
        """
        span = slice(layer_idx, layer_idx + actions.shape[0])
        (run_shares, skip_shares), always = (shares[span] for shares in self._shares), self._always[span]

        exited = self._exited | ((actions == Action.EXIT).cumsum(0) > 0)
        run = (actions == Action.PROCESS) & ~exited
        self._exited = exited[-1]
        if self._limit is not None:
            extra = (run & ~always) * (run_shares - skip_shares)
            wanted = self._wanted + extra.cumsum(0)
            run = run & (wanted <= self._limit + 1e-6)
            self._wanted = wanted[-1]
        run = run | always
        self.spent = self.spent + torch.where(run, run_shares, skip_shares).sum(0)
        return run

    def gate(self, gate: LinearGate, shares: Tensor, scores: Tensor, seen: int) -> GateCall:
        """Return what a gate needs to settle all tokens by itself; see `GateCall`."""
        limited = None
        if self._limit is not None:
            run_shares, skip_shares = self._shares
            limited = Limit(run_shares.contiguous(), skip_shares.contiguous(), self._wanted, self._limit)
        return GateCall(gate, shares, scores, seen, self._budget.always, limited)

    def charge(self, run: Tensor) -> None:
        """Charge the tokens for all layers, of which they ran those that ``run`` [L, B, T] says."""
        self.spent = torch.where(run.to(self._position_ids.device), *self._shares).sum(0)
