"""Skip the same layers for every token."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from anee_core.accounting.budget import SLACK
from anee_core.accounting.costs import CostModel
from anee_core.controllers.ranking import rank_layers
from anee_core.errors import BudgetError, PolicyError
from anee_core.interfaces.controller import Action, Controller, DecisionContext, protect_ends
from anee_core.interfaces.setting import Setting
from anee_core.ranges import CountOrNone


@dataclass(frozen=True)
class StaticController(Controller):
    """Skip a given set of layers, or the set that calibration finds least important for the budget.

    Options:
        skip: indices of the layers to skip, like ``skip=5 14``.
        exit: leave at this layer: it and all later ones are skipped.
        protect: how many first and last layers always run. None: none of a given set, ``2 2`` of a calibrated one.
    """

    name: ClassVar[str] = "static"

    skip: tuple[int, ...] | None = None
    exit: int | None = None
    protect: tuple[CountOrNone, ...] | None = None
    _actions: tuple[int, ...] = field(default=(), compare=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.skip is not None and not isinstance(self.skip, tuple):
            raise PolicyError(f"static: skip takes a tuple of layers; got {self.skip!r}")

    @property
    def needs_calibration(self) -> bool:
        """Whether the set has to be found first."""
        return self.skip is None and self.exit is None

    def protected(self, num_layers: int) -> frozenset[int]:
        """Return the protected first and last layers."""
        default = (2, 2) if self.needs_calibration else (0, 0)
        return protect_ends(default if self.protect is None else self.protect, num_layers)

    def bind(self, setting: Setting) -> StaticController:
        """Fix the set for one model.

        Raises:
            PolicyError: a layer does not exist, or there is neither a set nor a budget.
            BudgetError: the given set spends more than the budget.
        """
        layers = setting.num_layers
        protected = self.protected(layers)
        if self.needs_calibration:
            skipped = self._least_important(setting, protected)
        else:
            skipped = self._given(layers)
            kept = set(range(layers)) - (skipped - protected)
            spends = setting.costs.least_share(sorted(kept))
            if setting.budget is not None and spends > setting.budget + SLACK:
                raise BudgetError(
                    f"static: this set of layers spends {spends:.3f} of the dense model, more than the budget of "
                    f"{setting.budget:g}; skip more layers, raise the budget, or give none"
                )
        actions = [Action.SKIP if i in skipped else Action.PROCESS for i in range(layers)]
        if self.exit is not None:
            actions[self.exit :] = [Action.EXIT] * (layers - self.exit)
        return replace(self, _actions=tuple(int(action) for action in actions))

    def _given(self, layers: int) -> set[int]:
        wrong = [i for i in self.skip or () if i not in range(layers)]
        if wrong:
            raise PolicyError(f"static: no layer {wrong[0]} to skip; the model has layers 0 to {layers - 1}")
        if self.exit is not None and self.exit not in range(layers):
            raise PolicyError(f"static: exit={self.exit}; the model has layers 0 to {layers - 1}")
        return set(self.skip or ()) | set(range(layers if self.exit is None else self.exit, layers))

    @staticmethod
    def _least_important(setting: Setting, protected: frozenset[int]) -> set[int]:
        if setting.budget is None:
            raise PolicyError("static: say which layers to skip ('static:skip=5 14') or give a budget")
        order = rank_layers(setting, protected, "static")
        spends = _spend_by_count(setting.costs, order)
        count = max(k for k, share in enumerate(spends) if share <= setting.budget + SLACK)
        return set(order[count:])

    def decide(self, signals: Tensor, context: DecisionContext) -> Tensor:
        """Return the same actions for every token."""
        actions = torch.tensor(self._actions[context.layer_idx :], dtype=torch.uint8, device=signals.device)
        return actions[:, None, None].expand(-1, *signals.shape[:2])


def _spend_by_count(costs: CostModel, order: list[int]) -> list[float]:
    """Return the share of dense FLOPs a token spends when the first k layers of ``order`` run, for k = 0 to L."""
    run, skip = costs.run_shares, costs.skip_shares
    spends = [sum(skip)]
    for layer in order:
        spends.append(spends[-1] + run[layer] - skip[layer])
    return spends
