"""Running one layer: the call that people extend, and the seam behind which a faster one can stand."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from anee_core.adapter import LayerCall, ModelAdapter
from anee_core.cache import AdaptiveCache, CacheWriter
from anee_core.interfaces import Shortcut
from anee_core.layout import Parts
from anee_core.plan import Selection


class LayerStep(Protocol):
    """Runs decoder layers and projects the keys and values of skipped ones.

    An implementation may pack, compile or capture; `ReferenceStep` is what it must agree with.
    """

    def run(self, layer_idx: int, hidden_states: Tensor, call: LayerCall, view: CacheWriter) -> Tensor:
        """Run a layer on [R, C, D]; it stores keys and values through ``view`` and reads all slots from there."""
        ...

    def project(self, layer_idx: int, hidden_states: Tensor, call: LayerCall) -> tuple[Tensor, Tensor]:
        """Return keys and values [R, H, C, Dh] of hidden states [R, C, D]."""
        ...


class ReferenceStep:
    """Calls the model's own modules, wherever they are and whatever wraps them."""

    def __init__(self, adapter: ModelAdapter, parts: Parts) -> None:
        self._adapter, self._parts = adapter, parts

    def run(self, layer_idx: int, hidden_states: Tensor, call: LayerCall, view: CacheWriter) -> Tensor:
        """Run the decoder layer itself."""
        return self._adapter.run(self._parts, layer_idx, hidden_states, call, view)

    def project(self, layer_idx: int, hidden_states: Tensor, call: LayerCall) -> tuple[Tensor, Tensor]:
        """Project through the layer's own norm and projections."""
        return self._adapter.project_kv(self._parts, layer_idx, hidden_states, call)


def skip_some(
    step: LayerStep,
    layer_idx: int,
    hidden_states: Tensor,
    call: LayerCall,
    cache: AdaptiveCache,
    selection: Selection,
    mask: Tensor | None,
    shortcut: Shortcut | None = None,
) -> Tensor:
    """Run a layer for some tokens of a block [B, T, D]; give the others their keys and values, and their shortcut.

    The skipped tokens' keys and values are written first, so that later tokens of the block see them.
    ``mask`` is the block's additive mask [B, 1, T, S], or None if every query sees every slot.
    """
    assert selection.run is not None
    assert selection.skip is not None
    rows, columns = selection.skip
    skipped = hidden_states[rows, columns]
    keys, values = step.project(layer_idx, skipped, call.select(rows, columns))
    cache.write(layer_idx, keys, values, rows, columns)
    result = hidden_states
    if shortcut is not None:
        result = result.index_put((rows, columns), skipped + shortcut.estimate(layer_idx, skipped))

    rows, columns = selection.run
    chosen = call.select(rows, columns)
    if mask is not None:
        chosen = chosen.with_mask(mask[rows, 0, columns].unsqueeze(1))
    output = step.run(layer_idx, hidden_states[rows, columns], chosen, CacheWriter(cache, layer_idx, rows, columns))
    return result.index_put((rows.expand_as(columns), columns), output)


def devices_of(parts: Parts) -> tuple[torch.device, ...]:
    """Return the device of each layer."""
    return tuple(next(layer.parameters()).device for layer in parts.layers)
