"""What a decoder layer gets as its cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from anee_core.cache.adaptive_cache import AdaptiveCache


class CacheWriter:
    """What a decoder layer gets as its cache: it puts keys and values into slots already handed out.

    The layer computes some tokens of the block: all of them, or those at ``rows`` [R, 1] x ``columns`` [R, C].
    """

    def __init__(
        self, cache: AdaptiveCache, layer_idx: int, rows: Tensor | None = None, columns: Tensor | None = None
    ) -> None:
        self._cache, self._layer_idx, self._rows, self._columns = cache, layer_idx, rows, columns

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store [R, H, C, Dh] and return all the slots' keys and values for these rows, [R, H, S, Dh]."""
        cache, rows = self._cache, self._rows
        if self._columns is not None:
            keys, values = (gradient_once(states, self._columns, dim=2) for states in (keys, values))
        cache.write(self._layer_idx, keys, values, rows, self._columns)
        found = cache.keys_values(self._layer_idx)
        return found if rows is None else (found[0][rows[:, 0]], found[1][rows[:, 0]])


def gradient_once(states: Tensor, columns: Tensor, dim: int) -> Tensor:
    """Return the same numbers, those of a column that is repeated passing a gradient on only once.

    ``states`` are [R, ..., C, ...], with C at ``dim``, computed at columns [R, C] in ascending order. What is computed
    several times for one place is written there each time, and autograd would count all of them.
    """
    if not states.requires_grad:
        return states
    first = torch.cat((torch.ones_like(columns[:, :1]), columns.diff()), dim=1) != 0
    shape = [1] * states.dim()
    shape[0], shape[dim] = columns.shape
    return states.where(first.view(shape), states.detach())
