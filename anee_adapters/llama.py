"""LLaMA, whose names many families share."""

from __future__ import annotations

from typing import Any

from anee_core.interfaces import Layout, ModelAdapter, Recipe


class LlamaAdapter(ModelAdapter):
    """LLaMA, and SmolLM2, which is one: grouped-query attention, rotary positions given by the model."""

    layout = Layout(
        layers="model.layers",
        final_norm="model.norm",
        rotary="model.rotary_emb",
        attention="self_attn",
        mlp="mlp",
        input_norm="input_layernorm",
        key="self_attn.k_proj",
        value="self_attn.v_proj",
    )

    def recipe(self, config: Any) -> Recipe:
        """Return the recipe of LLaMA and of families that differ from it in norms and windows only."""
        return Recipe(
            layers=frozenset({"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"}),
            query="self_attn.q_proj",
            output="self_attn.o_proj",
            query_norm=None if self.layout.key_norm is None else "self_attn.q_norm",
            mlp_norm="post_attention_layernorm",
            gate="mlp.gate_proj",
            up="mlp.up_proj",
            down="mlp.down_proj",
            activation="hidden_act",
        )
