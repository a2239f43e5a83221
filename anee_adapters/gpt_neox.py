"""GPT-NeoX and Pythia: partial rotary positions, queries, keys and values interleaved head by head."""

from __future__ import annotations

from typing import Any

from anee_core.interfaces import Layout, ModelAdapter, Recipe


class GPTNeoXAdapter(ModelAdapter):
    """GPT-NeoX, parallel or sequential. A token that skips a layer gets keys and values from the layer itself."""

    layout = Layout(
        layers="gpt_neox.layers",
        embedding_dropout="gpt_neox.emb_dropout",
        final_norm="gpt_neox.final_layer_norm",
        rotary="gpt_neox.rotary_emb",
        attention="attention",
        mlp="mlp",
        input_norm="input_layernorm",
    )

    def recipe(self, config: Any) -> Recipe | None:
        """Return the recipe of parallel or sequential layers."""
        return Recipe(
            layers=frozenset({"GPTNeoXLayer"}),
            interleaved="attention.query_key_value",
            output="attention.dense",
            mlp_norm="post_attention_layernorm",
            up="mlp.dense_h_to_4h",
            down="mlp.dense_4h_to_h",
            activation="hidden_act",
            parallel=config.use_parallel_residual,
        )
