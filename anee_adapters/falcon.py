"""Falcon: one fused projection in three layouts, attention and MLP side by side or in sequence."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from anee_core.interfaces import LayerCall, Layout, ModelAdapter, Parts, Recipe


class FalconAdapter(ModelAdapter):
    """Falcon 7B, 40B, 180B and RW, with rotary positions."""

    layout = Layout(
        layers="transformer.h",
        final_norm="transformer.ln_f",
        rotary="transformer.rotary_emb",
        attention="self_attention",
        mlp="mlp",
        always_masked=True,
    )

    def layout_for(self, config: Any) -> Layout:
        """Name the fused projection where keys and values are its last rows.

        Elsewhere they lie between the queries, head by head or group by group, and the norm in front has two names:
        there the layer itself is asked.
        """
        if config.new_decoder_architecture or not config.multi_query:
            return self.layout
        return replace(self.layout, input_norm="input_layernorm", fused="self_attention.query_key_value")

    def recipe(self, config: Any) -> Recipe | None:
        """Return the recipe of layers with one key and value head, as in Falcon 7B; others have none."""
        if config.new_decoder_architecture or not config.multi_query:
            return None
        return Recipe(
            layers=frozenset({"FalconDecoderLayer"}),
            output="self_attention.dense",
            mlp_norm=None if config.parallel_attn else "post_attention_layernorm",
            up="mlp.dense_h_to_4h",
            down="mlp.dense_4h_to_h",
            activation="activation",
            parallel=config.parallel_attn,
        )

    def refuse(self, config: Any) -> str | None:
        """Refuse ALiBi."""
        if config.alibi:
            return (
                "alibi=True: transformers derives the ALiBi bias from the padding mask, as if every layer held every "
                "token, so it cannot follow a cache whose layers hold different tokens; "
                "use a Falcon with rotary positions"
            )
        return super().refuse(config)

    def layer_arguments(self, parts: Parts, call: LayerCall, layer_cache: Any) -> dict[str, Any]:
        """Add the bias that Falcon's layers must be given, though they need not use it."""
        return {"alibi": None, **super().layer_arguments(parts, call, layer_cache)}

    def kv_width(self, config: Any) -> int:
        """Return the width of one head with multi-query attention, else of all: groups are spread before caching."""
        shared = config.multi_query and not config.new_decoder_architecture
        return (1 if shared else config.num_attention_heads) * self.head_dim(config)
