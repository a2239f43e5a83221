"""GPT-J and CodeGen: interleaved rotary positions inside attention, attention and MLP side by side."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from anee_core.interfaces import LayerCall, Layout, ModelAdapter, Parts, Recipe, rotate_interleaved


class GPTJAdapter(ModelAdapter):
    """GPT-J. Before transformers 5.24 each layer looks positions up in its own table; since then the model does."""

    layout = Layout(
        layers="transformer.h",
        embedding_dropout="transformer.drop",
        final_norm="transformer.ln_f",
        attention="attn",
        mlp="mlp",
        input_norm="ln_1",
        key="attn.k_proj",
        value="attn.v_proj",
    )

    def begin(self, parts: Parts, hidden_states: Tensor, position_ids: Tensor) -> tuple[LayerCall, ...]:
        """Add the angles that the model looks up; layers that look for themselves are passed none."""
        call = LayerCall(position_ids)
        if _looks_up(parts):
            call = replace(call, position_embeddings=_looked_up(parts, 0, position_ids, hidden_states.dtype))
        return (call,) * len(parts.layers)

    def project_kv(self, parts: Parts, layer_idx: int, hidden_states: Tensor, call: LayerCall) -> tuple[Tensor, Tensor]:
        """Return keys and values as the default does, but with neighbours of the keys turned."""
        keys, values = super().project_kv(parts, layer_idx, hidden_states, replace(call, position_embeddings=None))
        looked_up = call.position_embeddings
        if looked_up is None:
            looked_up = _looked_up(parts, layer_idx, call.position_ids.to(keys.device), keys.dtype)
        sin, cos = looked_up
        return rotate_interleaved(keys, sin, cos), values

    def recipe(self, config: Any) -> Recipe | None:
        """Return the recipe of GPT-J: one norm, and rotary positions for neighbours."""
        return Recipe(
            layers=frozenset({"GPTJBlock"}),
            query="attn.q_proj",
            output="attn.out_proj",
            up="mlp.fc_in",
            down="mlp.fc_out",
            activation="activation_function",
            parallel=True,
            rotary_pairs=True,
        )

    def angles(self, parts: Parts, call: LayerCall) -> tuple[Tensor, Tensor] | None:
        """Return the angles of the table, which is the same in every layer, one for each number of a pair."""
        sin, cos = _looked_up(parts, 0, call.position_ids, parts.model.dtype)
        return cos.repeat_interleave(2, dim=-1), sin.repeat_interleave(2, dim=-1)


class CodeGenAdapter(GPTJAdapter):
    """CodeGen: GPT-J with queries, values and keys in four groups of one projection, so the layer itself is asked."""

    layout = replace(GPTJAdapter.layout, key=None, value=None)

    def project_kv(self, parts: Parts, layer_idx: int, hidden_states: Tensor, call: LayerCall) -> tuple[Tensor, Tensor]:
        """Return the keys and values that the layer gives its cache."""
        return self.capture_kv(parts, layer_idx, hidden_states, call)

    def recipe(self, config: Any) -> None:
        """Return None: no recipe knows such groups."""


def _looks_up(parts: Parts) -> bool:
    """Whether the model looks positions up, and not each layer."""
    return hasattr(parts.model.transformer, "rotary_emb")


def _looked_up(parts: Parts, layer_idx: int, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return sines and cosines [B, T, R / 2] from the model's table, or from a layer's."""
    place: Any = parts.model.transformer.rotary_emb if _looks_up(parts) else cast(Any, parts.layers[layer_idx]).attn
    sin, cos = place.embed_positions.to(position_ids.device)[position_ids].to(dtype).chunk(2, dim=-1)
    return sin, cos
