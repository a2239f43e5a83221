"""Whole sequences on their way through a model's layers, without a cache: what training and fitting look at."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anee_core.adapter.layout import Parts, attention_backend
from anee_core.adapter.model_adapter import ModelAdapter
from anee_core.cache.masks import additive, in_reach


class WholeSequences:
    """Token ids [B, T], and what takes their hidden states from layer to layer; gradients flow."""

    def __init__(self, adapter: ModelAdapter, parts: Parts, input_ids: Tensor) -> None:
        self._adapter, self._parts = adapter, parts
        positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        self._positions = positions[:1]
        self.embedded = adapter.embed(parts, parts.embedding(input_ids), positions)
        """[B, T, D] input of the first layer."""
        self._calls = adapter.begin(parts, self.embedded, positions)
        self._masks: dict[int | None, Tensor] = {}
        self._implicit = attention_backend(parts.config) == "sdpa" and not parts.layout.always_masked

    def layer(self, layer_idx: int, hidden_states: Tensor, log_visible: Tensor | None = None) -> Tensor:
        """Run a layer on hidden states [B, T, D].

        ``log_visible`` [B, T, T] is added to the attention's logits: the logarithm of how much a query sees of a key.
        """
        window = self._adapter.window(self._parts.config, layer_idx)
        all_seen = window is None or window >= self._positions.shape[1]
        mask = None
        if log_visible is not None or not (all_seen and self._implicit):
            mask = self._mask(window)
            if log_visible is not None:
                mask = (mask + log_visible[:, None]).clamp(min=torch.finfo(hidden_states.dtype).min)
            mask = mask.to(hidden_states.dtype)
        call = self._calls[layer_idx].with_mask(mask)
        return self._adapter.run(self._parts, layer_idx, hidden_states, call, _NoCache())

    def logits(self, hidden_states: Tensor) -> Tensor:
        """Return logits [B, T, V] of the last layer's output [B, T, D]."""
        return self._adapter.logits(self._parts, self._parts.final_norm(hidden_states))

    def _mask(self, window: int | None) -> Tensor:
        if window not in self._masks:
            self._masks[window] = additive(in_reach(self._positions, self._positions, window), torch.float32)
        return self._masks[window]


class _NoCache:
    """What a layer gets as its cache: hands keys and values back."""

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return keys, values
