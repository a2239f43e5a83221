"""GPT-2: learned positions, one fused projection for queries, keys and values."""

from __future__ import annotations

from typing import Any

from anee_core.interfaces import Layout, ModelAdapter, Recipe


class GPT2Adapter(ModelAdapter):
    """GPT-2 of any size."""

    layout = Layout(
        layers="transformer.h",
        final_norm="transformer.ln_f",
        learned_positions="transformer.wpe",
        embedding_dropout="transformer.drop",
        attention="attn",
        mlp="mlp",
        input_norm="ln_1",
        fused="attn.c_attn",
    )

    def recipe(self, config: Any) -> Recipe | None:
        """Return the recipe of GPT-2's blocks without cross-attention."""
        if config.add_cross_attention or config.reorder_and_upcast_attn:
            return None
        return Recipe(
            layers=frozenset({"GPT2Block"}),
            output="attn.c_proj",
            mlp_norm="ln_2",
            up="mlp.c_fc",
            down="mlp.c_proj",
            activation="activation_function",
        )
