"""Phi-3 and Phi-4: LLaMA with fused projections."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from anee_adapters.llama import LlamaAdapter
from anee_core.interfaces import Recipe


class Phi3Adapter(LlamaAdapter):
    """Phi-3, with or without a sliding window; with LongRoPE up to the length that its short factors are made for."""

    layout = replace(LlamaAdapter.layout, key=None, value=None, fused="self_attn.qkv_proj", windows="all")

    def recipe(self, config: Any) -> Recipe:
        """Return LLaMA's recipe with the MLP's two inputs in one projection."""
        return Recipe(
            layers=frozenset({"Phi3DecoderLayer"}),
            output="self_attn.o_proj",
            mlp_norm="post_attention_layernorm",
            gate_up="mlp.gate_up_proj",
            down="mlp.down_proj",
            activation="hidden_act",
        )
