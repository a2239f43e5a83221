"""Skip layers at random: the control that every other policy has to beat."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from anee_core.accounting.costs import CostModel
from anee_core.errors import PolicyError
from anee_core.interfaces.controller import Action, Controller, DecisionContext, protect_ends
from anee_core.interfaces.hashed_random import uniform
from anee_core.interfaces.setting import Setting
from anee_core.ranges import CountOrNone, Seed, Share


@dataclass(frozen=True)
class RandomController(Controller):
    """Skip each (layer, token) pair with the same probability.

    The draw is a hash of seed, layer, position and token id, so a token gets the same layers however it is batched.

    Options:
        p: probability of a skip. None: what meets the budget on average.
        exit: probability of leaving at a layer that is not protected.
        protect: how many first and last layers always run.
        seed: selects another draw.
    """

    name: ClassVar[str] = "random"

    p: Share | None = None
    exit: Share = 0.0
    protect: tuple[CountOrNone, ...] = (2, 2)
    seed: Seed = 0
    _costs: CostModel | None = field(default=None, compare=False, repr=False)

    def protected(self, num_layers: int) -> frozenset[int]:
        """Return the protected first and last layers."""
        return protect_ends(self.protect, num_layers)

    def bind(self, setting: Setting) -> RandomController:
        """Fix the probability for one model.

        Raises:
            PolicyError: there is neither a probability nor a budget.
        """
        if self.p is None and setting.budget is None:
            raise PolicyError("random: say how often to skip ('random:p=0.3') or give a budget")
        return replace(self, _costs=setting.costs)

    def _probability(self, context: DecisionContext) -> float | Tensor:
        """Return the probability of a skip: the given one, or that which spends each token's budget on average."""
        if self.p is not None:
            return self.p
        assert self._costs is not None
        assert context.budget is not None
        run, skip = self._costs.token_shares(context.position_ids)
        protected = torch.zeros(context.num_layers, dtype=torch.bool, device=run.device)
        protected[list(self.protected(context.num_layers))] = True
        least = torch.where(protected[:, None, None], run, skip).sum(0)
        # least + (1 - p) (1 - least) = budget
        return (1.0 - context.budget) / (1.0 - least).clamp(min=1e-6)

    def decide(self, signals: Tensor, context: DecisionContext) -> Tensor:
        """Return actions for all layers at once."""
        layers = torch.arange(context.layer_idx, context.num_layers, device=signals.device)[:, None, None]
        tokens = torch.zeros_like(context.position_ids) if context.input_ids is None else context.input_ids
        skip = uniform(layers, context.position_ids, tokens, 2 * self.seed) < self._probability(context)
        actions = skip.to(torch.uint8) * int(Action.SKIP)
        if self.exit:
            leave = uniform(layers, context.position_ids, tokens, 2 * self.seed + 1) < self.exit
            first, last = self.protect
            inner = (layers >= first) & (layers < context.num_layers - last)
            actions = torch.where(leave & inner, int(Action.EXIT), actions)
        return actions
