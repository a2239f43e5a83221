"""Deferred propagation: what a skipped layer is owed is paid when it next runs.

A skipped layer's keys and values are needed only once a later token runs that layer. Until then the tokens' hidden
states are kept, those of several layers in a row being one and the same, and projected together: the weights of the
projections are read once for many tokens, and not at all for a layer that stays skipped.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anee_core.adapter import LayerCall
from anee_core.cache import AdaptiveCache
from anee_core.layer_step import Places, StepAround

_MOST = 64
"""Tokens that a layer may owe keys and values; more are paid at once, which bounds the memory."""


class DeferredStep(StepAround):
    """Puts off propagation while a model decodes token by token; another step does the work."""

    def begin(self, hidden_states: Tensor, cache: AdaptiveCache) -> None:
        """Let the step look at the block, and the cache know who pays."""
        self._step.begin(hidden_states, cache)
        cache.pay = self._step.settle

    @property
    def takes_all(self) -> bool:
        """No: what a layer owes is seen to before it runs."""
        return False

    def run(self, layer_idx: int, hidden_states: Tensor, call: LayerCall, cache: AdaptiveCache, *args: Any) -> Tensor:
        """Pay what the layer owes, and run it."""
        cache.settle(layer_idx)
        return self._step.run(layer_idx, hidden_states, call, cache, *args)

    def propagate(
        self, layer_idx: int, hidden_states: Tensor, call: LayerCall, cache: AdaptiveCache, places: Places | None
    ) -> None:
        """Note what is owed, if a whole batch of single tokens skips the layer; otherwise pay at once."""
        batch, length = hidden_states.shape[:2]
        if places is not None or length > 1 or torch.is_grad_enabled():
            return self._step.propagate(layer_idx, hidden_states, call, cache, places)
        if batch * cache.owe(layer_idx, hidden_states, call) >= _MOST:
            cache.settle(layer_idx)
        return None
