"""GPT-J: interleaved rotary positions inside attention, attention and MLP side by side."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from anee_core.interfaces import LayerCall, Layout, ModelAdapter, Parts
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
        attention: Any = parts.layers[layer_idx].attn
        table = attention.embed_positions.to(keys.device)
        sin, cos = table[call.position_ids].to(keys.dtype).chunk(2, dim=-1)
        return rotate_interleaved(keys, sin, cos), values
