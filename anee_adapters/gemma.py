"""Gemma: scaled embeddings, four norms a layer, windows in some layers, soft caps on the logits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from anee_adapters.llama import LlamaAdapter
from anee_core.interfaces import Recipe


class GemmaAdapter(LlamaAdapter):
    """Gemma. The embedding module scales by itself."""

    def recipe(self, config: Any) -> Recipe:
        """Return LLaMA's recipe, for Gemma's layers."""
        return replace(super().recipe(config), layers=frozenset({"GemmaDecoderLayer"}))


class Gemma2Adapter(GemmaAdapter):
    """Gemma 2: Gemma with windows in some layers, and soft caps."""

    layout = replace(GemmaAdapter.layout, windows="by type", logits_cap="final_logit_softcapping")

    def recipe(self, config: Any) -> Recipe:
        """Return Gemma's recipe, with norms behind attention and MLP too."""
        return replace(
            super().recipe(config),
            layers=frozenset({"Gemma2DecoderLayer"}),
            attended_norm="post_attention_layernorm",
            mlp_norm="pre_feedforward_layernorm",
            changed_norm="post_feedforward_layernorm",
            activation="hidden_activation",
            # PyTorch's attention has no cap: a model that attends by it computes none, whatever its config says.
            cap=None if config._attn_implementation == "sdpa" else "attn_logit_softcapping",
        )


class Gemma3Adapter(Gemma2Adapter):
    """Gemma 3, text only. Rotary frequencies differ between layers with and without a window."""

    layout = replace(Gemma2Adapter.layout, key_norm="self_attn.k_norm")

    def recipe(self, config: Any) -> Recipe:
        """Return Gemma 2's recipe without the cap."""
        return replace(super().recipe(config), layers=frozenset({"Gemma3DecoderLayer"}), cap=None)

    def refuse(self, config: Any) -> str | None:
        """Refuse attention to the future."""
        if config.use_bidirectional_attention:
            return "use_bidirectional_attention=True: later tokens would change what a layer computed for earlier ones"
        return super().refuse(config)
