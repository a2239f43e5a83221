"""Deferred propagation: what a skipped layer is owed is paid when it next runs.

A skipped layer's keys and values are needed only once a later token runs that layer. Until then the tokens' hidden
states are kept, those of several layers in a row being one and the same, and projected together: the weights of the
projections are read once for many tokens, and not at all for a layer that stays skipped.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from anee_core.accounting.token_state import TokenState
from anee_core.adapter.layer_call import LayerCall
from anee_core.cache.adaptive_cache import AdaptiveCache
from anee_core.steps.calls import LayerInput, Stack
from anee_core.steps.layer_step import StepAround

_MOST = 64
"""Tokens whose keys and values a layer may be owed; more are written at once, which bounds the memory."""


class DeferredStep(StepAround):
    """Put off propagation while a model decodes token by token; another step does the work."""

    def begin(self, hidden_states: Tensor, cache: AdaptiveCache) -> None:
        """Let the step look at the block, and the cache know who writes what is owed."""
        self._step.begin(hidden_states, cache)
        cache.settle_with = self._settle

    def _settle(
        self, cache: AdaptiveCache, layer_idx: int, hidden_states: Tensor, call: LayerCall, slots: Tensor
    ) -> None:
        self._step.settle(LayerInput(layer_idx, hidden_states, call, cache), slots)

    def all_layers(self, hidden_states: Tensor, stack: Stack, cache: AdaptiveCache) -> Tensor | None:
        """Write what the layers that run are owed, take all, and note what those are owed that a whole batch skips."""
        length = hidden_states.shape[1]
        if stack.gate is not None or length > 1 or torch.is_grad_enabled():
            cache.settle_all()  # who runs what is not known yet, or is too much to put off
            return self._step.all_layers(hidden_states, stack, cache)
        skipped = (stack.states == TokenState.SKIPPED).all(1)  # [L, 1]
        for layer_idx, whole in enumerate(skipped.tolist()):
            if not whole[0]:
                cache.settle(layer_idx)
        states = stack.states.masked_fill(skipped[..., None], TokenState.DEFERRED)
        inputs = hidden_states.new_empty(len(states), *hidden_states.shape)
        output = self._step.all_layers(hidden_states, replace(stack, states=states, inputs=inputs), cache)
        if output is not None:
            self._owe(skipped[:, 0].tolist(), inputs, stack, cache)
        return output

    def _owe(self, skipped: list[bool], inputs: Tensor, stack: Stack, cache: AdaptiveCache) -> None:
        """Note what the layers are owed that were ``skipped``, given all layers' ``inputs`` [L, B, 1, D]."""
        shared: Tensor | None = None
        for layer_idx, whole in enumerate(skipped):
            if not whole:
                shared = None
                continue
            if shared is None or stack.shortcut is not None:  # or else layers in a row have the same input
                shared = inputs[layer_idx].clone()
            if len(shared) * cache.owe(layer_idx, shared, stack.call) >= _MOST:
                cache.settle(layer_idx)

    def run(self, given: LayerInput, mask: Tensor | None) -> Tensor:
        """Write what the layer is owed, and run it."""
        given.cache.settle(given.layer_idx)
        return self._step.run(given, mask)

    def propagate(self, given: LayerInput) -> None:
        """Note what the layer is owed, if a whole batch of single tokens skips it; otherwise write it at once."""
        batch, length = given.hidden_states.shape[:2]
        if given.places is not None or length > 1 or torch.is_grad_enabled():
            return self._step.propagate(given)
        if batch * given.cache.owe(given.layer_idx, given.hidden_states, given.call) >= _MOST:
            given.cache.settle(given.layer_idx)
        return None
