"""GPT-J: interleaved rotary positions inside attention, attention and MLP side by side."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from anee_core.interfaces import LayerCall, Layout, ModelAdapter, Parts, Recipe
from anee_core.rotary import rotate_interleaved


class GPTJAdapter(ModelAdapter):
    """GPT-J, whose layers return a tuple and look positions up in a table of their own."""

    layout: ClassVar[Layout] = Layout(
        layers="transformer.h",
        final_norm="transformer.ln_f",
        attention="attn",
        mlp="mlp",
        input_norm="ln_1",
        key="attn.k_proj",
        value="attn.v_proj",
        cache_argument="layer_past",
        returns_tuple=True,
    )

    def project_kv(self, parts: Parts, layer_idx: int, hidden_states: Tensor, call: LayerCall) -> tuple[Tensor, Tensor]:
        """Turn the default's keys: what it would turn them by, the model's other families pass to every layer."""
        keys, values = super().project_kv(parts, layer_idx, hidden_states, call)
        sin, cos = _looked_up(parts, layer_idx, call.position_ids.to(keys.device), keys.dtype)
        return rotate_interleaved(keys, sin, cos), values

    def recipe(self, config: Any) -> Recipe | None:
        """Return that of GPT-J: one norm, and rotary positions for neighbours."""
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
        """Return those of the table, which is the same in every layer, one for each number of a pair."""
        sin, cos = _looked_up(parts, 0, call.position_ids, parts.model.dtype)
        return cos.repeat_interleave(2, dim=-1), sin.repeat_interleave(2, dim=-1)


def _looked_up(parts: Parts, layer_idx: int, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return sines and cosines [B, T, R / 2] from a layer's table."""
    attention: Any = parts.layers[layer_idx].attn
    sin, cos = attention.embed_positions.to(position_ids.device)[position_ids].to(dtype).chunk(2, dim=-1)
    return sin, cos
