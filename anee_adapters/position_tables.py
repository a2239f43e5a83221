"""BioGPT and XGLM: OPT's layers, and tables of positions that are called in ways of their own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.nn import functional

from anee_adapters.opt import OPTAdapter
from anee_core.interfaces import ModelAdapter, Parts, Recipe

_LAYOUT = replace(
    OPTAdapter.layout,
    layers="model.layers",
    final_norm="model.layer_norm",
    learned_positions="model.embed_positions",
)


class BioGptAdapter(ModelAdapter):
    """BioGPT. The embedding module scales by itself."""

    layout = replace(
        _LAYOUT, layers="biogpt.layers", final_norm="biogpt.layer_norm", learned_positions="biogpt.embed_positions"
    )

    def embed(self, parts: Parts, token_embeddings: Tensor, position_ids: Tensor) -> Tensor:
        """Name the positions: their table wants a padding mask first."""
        positions: Tensor = parts.learned_positions(None, position_ids=position_ids)
        states = token_embeddings + positions.to(token_embeddings.device)
        return functional.dropout(states, parts.config.hidden_dropout_prob, parts.model.training)

    def recipe(self, config: Any) -> Recipe:
        """Return OPT's recipe, for BioGPT's layers."""
        return _recipe("BioGptDecoderLayer", "hidden_act")


class XGLMAdapter(ModelAdapter):
    """XGLM. Its table holds sines and grows with the positions that are asked for."""

    layout = _LAYOUT

    def embed(self, parts: Parts, token_embeddings: Tensor, position_ids: Tensor) -> Tensor:
        """Say how far the positions reach, so that the table is long enough."""
        before = int(position_ids.max()) + 1 - position_ids.shape[1]
        positions: Tensor = parts.learned_positions(position_ids, before)
        states = token_embeddings + positions.to(token_embeddings.device)
        return functional.dropout(states, parts.config.dropout, parts.model.training)

    def position_limit(self, parts: Parts) -> int | None:
        """Return None: sines have no end."""
        return None

    def recipe(self, config: Any) -> Recipe:
        """Return OPT's recipe, for XGLM's layers."""
        return _recipe("XGLMDecoderLayer", "activation_function")


def _recipe(layer: str, activation: str) -> Recipe:
    return Recipe(
        layers=frozenset({layer}),
        query="self_attn.q_proj",
        output="self_attn.out_proj",
        mlp_norm="final_layer_norm",
        up="fc1",
        down="fc2",
        activation=activation,
    )
