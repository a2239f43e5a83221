"""The step that calls the model's own modules: what every faster one must agree with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anee_core.adapter.layout import Parts
from anee_core.adapter.model_adapter import ModelAdapter
from anee_core.cache.adaptive_cache import AdaptiveCache
from anee_core.cache.writer import CacheWriter
from anee_core.steps.calls import LayerInput, Stack


class ReferenceStep:
    """Call the model's own modules, wherever they are and whatever wraps them."""

    def __init__(self, adapter: ModelAdapter, parts: Parts) -> None:
        self._adapter, self._parts = adapter, parts

    @property
    def slow_because(self) -> str | None:
        """Why layers run by their own modules: because that was asked for."""
        return "fast=False"

    @property
    def takes_all(self) -> bool:
        """Whether layers may be taken at once, which modules cannot be."""
        return False

    def begin(self, hidden_states: Tensor, cache: AdaptiveCache) -> None:
        """Do nothing: modules need no preparation."""

    def all_layers(self, hidden_states: Tensor, stack: Stack, cache: AdaptiveCache) -> Tensor | None:
        """Return None: layers are taken one by one, by `run` and `propagate`."""
        return None

    def run(self, given: LayerInput, mask: Tensor | None) -> Tensor:
        """Run the decoder layer itself."""
        hidden_states, call = given.selected()
        rows, columns = given.places or (None, None)
        if mask is not None and rows is not None and columns is not None:
            mask = mask[rows, 0, columns].unsqueeze(1)
        writer = CacheWriter(given.cache, given.layer_idx, rows, columns)
        return self._adapter.run(self._parts, given.layer_idx, hidden_states, call.with_mask(mask), writer)

    def propagate(self, given: LayerInput) -> None:
        """Write keys and values through the layer's own norm and projections."""
        keys, values = self._adapter.project_kv(self._parts, given.layer_idx, *given.selected())
        given.cache.write(given.layer_idx, keys, values, *(given.places or ()))

    def settle(self, given: LayerInput, slots: Tensor) -> None:
        """Write the keys and values of all the tokens at once."""
        keys, values = self._adapter.project_kv(self._parts, given.layer_idx, given.hidden_states, given.call)
        given.cache.write_slots(given.layer_idx, keys, values, slots)

    def norm(self, hidden_states: Tensor) -> Tensor:
        """Apply the norm itself."""
        normed: Tensor = self._parts.final_norm(hidden_states)
        return normed

    def head(self, hidden_states: Tensor) -> Any:
        """Return the head itself."""
        return self._parts.head


def devices_of(parts: Parts) -> tuple[torch.device, ...]:
    """Return the device of each layer."""
    return tuple(next(layer.parameters()).device for layer in parts.layers)
