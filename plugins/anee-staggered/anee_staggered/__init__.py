"""A layer policy for ANEE: every token skips layers, no two neighbours the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from anee_core.errors import PolicyError
from anee_core.hookspecs import hookimpl
from anee_core.interfaces import Action, Controller, DecisionContext, Setting, protect_ends
from anee_core.ranges import Share

_GOLDEN = 0.6180339887498949
"""Multiples of it, taken modulo 1, fill the unit interval evenly however many there are."""


@dataclass(frozen=True)
class StaggeredController(Controller):
    """Run a share of the layers, spread evenly over layers and tokens.

    Options:
        share: share of the layers that run, protected ones apart. None: what the budget pays for.
        protect: how many first and last layers always run.
    """

    name: ClassVar[str] = "staggered"

    share: Share | None = None
    protect: tuple[int, ...] = (2, 2)

    def protected(self, num_layers: int) -> frozenset[int]:
        """Return the protected first and last layers."""
        return protect_ends(self.protect, num_layers)

    def bind(self, setting: Setting) -> StaggeredController:
        """Fix the share for one model and budget.

        Raises:
            PolicyError: there is neither a share nor a budget.
        """
        if self.share is not None:
            return self
        if setting.budget is None:
            raise PolicyError("staggered: say how many layers to run ('staggered:share=0.8') or give a budget")
        # Running the share s of the free layers costs least + s (1 - least).
        least = setting.costs.least_share(sorted(self.protected(setting.num_layers)))
        return replace(self, share=min(max((setting.budget - least) / (1.0 - least), 0.0), 1.0))

    def decide(self, signals: Tensor, context: DecisionContext) -> Tensor:
        """Return actions [N, B, T] for all layers at once."""
        layers = torch.arange(context.layer_idx, context.num_layers, device=signals.device)[:, None, None]
        place = (layers + context.num_layers * context.position_ids).double() * _GOLDEN % 1.0
        return torch.where(place < self.share, Action.PROCESS, Action.SKIP).to(torch.uint8)


@hookimpl
def anee_controllers() -> Mapping[str, type[Controller]]:
    """Return the policy by the name that a policy string uses."""
    return {"staggered": StaggeredController}
