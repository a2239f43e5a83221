"""LLaMA, whose names many families share."""

from __future__ import annotations

from typing import ClassVar

from anee_core.interfaces import Layout, ModelAdapter


class LlamaAdapter(ModelAdapter):
    """LLaMA, and SmolLM2, which is one: grouped-query attention, rotary positions given by the model."""

    layout: ClassVar[Layout] = Layout(
        layers="model.layers",
        final_norm="model.norm",
        rotary="model.rotary_emb",
        attention="self_attn",
        mlp="mlp",
        input_norm="input_layernorm",
        key="self_attn.k_proj",
        value="self_attn.v_proj",
    )
