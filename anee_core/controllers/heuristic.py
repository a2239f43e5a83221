"""Run the most important layers the budget pays for, and spend less where the model was sure of the token."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from anee_core.accounting.budget import SLACK
from anee_core.accounting.costs import CostModel
from anee_core.controllers.ranking import rank_layers
from anee_core.interfaces.controller import Action, Controller, DecisionContext, protect_ends
from anee_core.interfaces.setting import Setting
from anee_core.ranges import CountOrNone, SomeShare, Within


@dataclass(frozen=True)
class HeuristicController(Controller):
    """Decide by calibrated importance and last-token confidence, under the budget.

    Layers are ordered by calibrated importance. A token may spend the budget, plus what its sequence has left over,
    plus or minus ``spread`` by how the largest probability of the distribution it was drawn from ranks among the
    calibrated ones: sure tokens get fewer layers. It runs the most important layers that this pays for.

    What is left over is carried along a sequence, so its average meets the budget on any text. That makes the
    decision depend on the model's own output: whole sequences run token by token.

    Options:
        spread: how far a token's share may lie from the budget.
        exit: confidence in (0, 1] from which a token leaves at half depth; None for never.
        protect: how many first and last layers always run.
    """

    name: ClassVar[str] = "heuristic"
    signals: ClassVar[tuple[str, ...]] = ("max_probability", "remaining_budget")
    default_budget: ClassVar[float | None] = 0.75

    spread: Annotated[float, Within(0, 0.5, whole=False)] = 0.1
    exit: SomeShare | None = None
    protect: tuple[CountOrNone, ...] = (2, 2)
    _rank: Tensor = field(default_factory=lambda: torch.empty(0), compare=False, repr=False)
    _order: Tensor = field(default_factory=lambda: torch.empty(0), compare=False, repr=False)
    _costs: CostModel | None = field(default=None, compare=False, repr=False)
    _confidence: Tensor = field(default_factory=lambda: torch.empty(0), compare=False, repr=False)
    _limit: float = field(default=1.0, compare=False, repr=False)
    _ceiling: float = field(default=1.0, compare=False, repr=False)

    @property
    def needs_calibration(self) -> bool:
        """Whether `bind` needs a calibration: always."""
        return True

    def protected(self, num_layers: int) -> frozenset[int]:
        """Return the protected first and last layers."""
        return protect_ends(self.protect, num_layers)

    def bind(self, setting: Setting) -> HeuristicController:
        """Order the layers of one model by importance."""
        order = rank_layers(setting, self.protected(setting.num_layers), self.name)
        assert setting.calibration is not None
        budget = setting.budget if setting.budget is not None else self.default_budget
        assert budget is not None
        rank = torch.empty(len(order), dtype=torch.long)
        rank[torch.tensor(order)] = torch.arange(len(order))
        return replace(
            self,
            _rank=rank,
            _order=torch.tensor(order),
            _costs=setting.costs,
            _confidence=setting.calibration.confidence.float(),
            _limit=budget,
            _ceiling=budget if setting.hard else 1.0,
        )

    def decide(self, signals: Tensor, context: DecisionContext) -> Tensor:
        """Return actions for all layers at once."""
        device = signals.device
        confidence, remaining = signals[..., 0], signals[..., 1]
        quantiles = self._confidence.to(device)
        sureness = torch.searchsorted(quantiles, confidence.contiguous()) / len(quantiles)
        # Debts and savings of the sequence are evened out within the same spread, so that no token starves.
        left_over = (remaining - self._limit).clamp(-self.spread, self.spread)
        allowance = self._limit + left_over + self.spread * (1.0 - 2.0 * sureness)
        count = self._affordable(allowance.clamp(max=self._ceiling), context.position_ids)
        actions = (self._rank.to(device)[:, None, None] >= count).to(torch.uint8) * int(Action.SKIP)
        if self.exit is not None:
            half = context.num_layers // 2
            deep = torch.arange(context.num_layers, device=device)[:, None, None] >= half
            actions = torch.where(deep & (confidence >= self.exit), int(Action.EXIT), actions)
        return actions[context.layer_idx :]

    def _affordable(self, allowance: Tensor, position_ids: Tensor) -> Tensor:
        """Return how many layers, most important first, an allowance [B, T] pays for, [B, T]."""
        assert self._costs is not None
        run, skip = self._costs.token_shares(position_ids)
        order = self._order.to(run.device)
        extra = (run - skip).index_select(0, order).cumsum(0)
        return (skip.sum(0) + extra <= allowance + SLACK).sum(0)
