"""GPT-BigCode (StarCoder): GPT-2 with one head of keys and values for all queries, or with one for each."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from anee_adapters.gpt2 import GPT2Adapter
from anee_core.interfaces import Layout, Recipe


class GPTBigCodeAdapter(GPT2Adapter):
    """GPT-BigCode, multi-query or not."""

    def layout_for(self, config: Any) -> Layout:
        """Name the fused projection where keys and values are its last rows; elsewhere they lie head by head."""
        return self.layout if config.multi_query else replace(self.layout, fused=None)

    def recipe(self, config: Any) -> Recipe | None:
        """Return GPT-2's recipe, for GPT-BigCode's blocks."""
        if config.add_cross_attention:
            return None
        return Recipe(
            layers=frozenset({"GPTBigCodeBlock"}),
            interleaved=None if config.multi_query else "attn.c_attn",
            output="attn.c_proj",
            mlp_norm="ln_2",
            up="mlp.c_fc",
            down="mlp.c_proj",
            activation="activation_function",
        )

    def kv_width(self, config: Any) -> int:
        """Return the width of one head with multi-query attention, else of all."""
        return (1 if config.multi_query else config.num_attention_heads) * self.head_dim(config)
