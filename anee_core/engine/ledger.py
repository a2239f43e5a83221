"""Turn a controller's actions into what is executed: protected layers, exits and the budget."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from anee_core.accounting.budget import SLACK, Budget
from anee_core.interfaces.controller import Action
from anee_core.interfaces.formulas import LinearGate
from anee_core.steps.calls import GateCall, KnownScores, Limit


class Ledger:
    """What each token of one forward has spent so far, and which tokens have exited.

    Whatever nobody asks for is not worked out.
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
        """What each token spends if it runs the layers wanted so far and skips all others that it may, [B, T]."""
        return torch.where(self._always, *self._shares).sum(0)

    @cached_property
    def spent(self) -> Tensor:
        """Share of a dense token's layer FLOPs that each token has spent, [B, T]."""
        return torch.zeros_like(self._shares[0][0])

    @cached_property
    def _exited(self) -> Tensor:
        """Which tokens have exited, [B, T]."""
        return torch.zeros_like(self._position_ids, dtype=torch.bool)

    def admit(self, actions: Tensor, layer_idx: int) -> Tensor:
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
            run = run & (wanted <= self._limit + SLACK)
            self._wanted = wanted[-1]
        run = run | always
        self.spent = self.spent + torch.where(run, run_shares, skip_shares).sum(0)
        return run

    def gate(self, gate: LinearGate, known: KnownScores) -> GateCall:
        """Return what a gate needs to decide on all tokens by itself; see `GateCall`."""
        limited = None
        if self._limit is not None:
            run_shares, skip_shares = self._shares
            limited = Limit(run_shares.contiguous(), skip_shares.contiguous(), self._wanted, self._limit)
        return GateCall(gate, known, self._budget.always, limited)

    def charge(self, run: Tensor) -> None:
        """Charge the tokens for all layers, of which they ran those that ``run`` [L, B, T] says."""
        self.spent = torch.where(run.to(self._position_ids.device), *self._shares).sum(0)
