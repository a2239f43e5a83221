"""How many tokens a layer may hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from anee_core.errors import PolicyError
from anee_core.interfaces.cache_policy import CachePolicy
from anee_core.interfaces.setting import Setting
from anee_core.ranges import MOST, Count, Within

_KEPT = f"a share in (0, 1] or a whole number of tokens above 1, at most {MOST:,}"
Kept = Annotated[float, Within(0, MOST, whole=False, without_least=True, told=_KEPT)]
"""A share of tokens up to 1, and a number of tokens above."""


@dataclass(frozen=True)
class BudgetedCachePolicy(CachePolicy):
    """A token policy with a budget.

    Options:
        keep: how much each row of a layer may hold. Up to 1: a share of the tokens read so far. Above: a number of
            tokens. Several, one for each layer, separated by spaces.
        least: the fewest tokens that a share stands for. Below it nothing is dropped: the first tokens of a sequence,
            which models lean on, would have to go before there are others.
    """

    keep: tuple[Kept, ...] = (0.2,)
    least: Count = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        given: Any = self.keep
        values = given if isinstance(given, tuple) else (given,)
        if not values or any(v > 1 and v != int(v) for v in values):
            raise PolicyError(
                f"{self.name}: keep is {_KEPT}, or one for each layer; "
                f"got {' '.join(f'{v:g}' for v in values) or 'nothing'}"
            )
        object.__setattr__(self, "keep", tuple(float(v) for v in values))

    def bind(self, setting: Setting) -> CachePolicy:
        """Check the budgets against the model.

        Raises:
            PolicyError: there are neither one nor as many as layers.
        """
        if len(self.keep) not in (1, setting.num_layers):
            raise PolicyError(
                f"{self.name}: keep takes one number or one for each of {setting.num_layers} layers; "
                f"got {len(self.keep)}"
            )
        return self

    def allowed(self, layer_idx: int, query_position: Tensor) -> Tensor:
        """Return how many tokens may be held after tokens at these positions, of the same shape."""
        keep = self.keep[layer_idx] if len(self.keep) > 1 else self.keep[0]
        if keep > 1:
            return torch.full_like(query_position, int(keep))
        # In hundredths of a token, lest a share like 0.3 of 10 tokens should round up to four of them.
        return torch.ceil((query_position + 1).double() * keep - 0.01).clamp(min=self.least).long()
