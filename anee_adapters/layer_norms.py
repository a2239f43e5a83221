"""Phi, StableLM and StarCoder 2: LLaMA's names with layer norms, and keys that may be normed per head."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.nn import functional

from anee_adapters.llama import LlamaAdapter
from anee_core.interfaces import Layout, ModelAdapter, Parts, Recipe


class PhiAdapter(ModelAdapter):
    """Phi 1 to 2: attention and MLP side by side behind one norm."""

    layout = replace(LlamaAdapter.layout, final_norm="model.final_layernorm", embedding_dropout="model.embed_dropout")

    def layout_for(self, config: Any) -> Layout:
        """Name the norm over each head's keys, if there is one."""
        return replace(self.layout, key_norm="self_attn.k_layernorm") if config.qk_layernorm else self.layout

    def recipe(self, config: Any) -> Recipe:
        """Return the recipe of Phi's layers."""
        return Recipe(
            layers=frozenset({"PhiDecoderLayer"}),
            query="self_attn.q_proj",
            query_norm="self_attn.q_layernorm" if config.qk_layernorm else None,
            output="self_attn.dense",
            up="mlp.fc1",
            down="mlp.fc2",
            activation="hidden_act",
            parallel=True,
        )


class StableLmAdapter(ModelAdapter):
    """StableLM. Where keys are normed, each head has a norm of its own, and the layer itself is asked."""

    layout = LlamaAdapter.layout

    def layout_for(self, config: Any) -> Layout:
        """Leave out the projections if keys are normed."""
        return replace(self.layout, key=None, value=None) if config.qk_layernorm else self.layout

    def recipe(self, config: Any) -> Recipe | None:
        """Return LLaMA's recipe, for StableLM's layers; None if keys are normed."""
        if config.qk_layernorm:
            return None
        recipe = replace(LlamaAdapter().recipe(config), layers=frozenset({"StableLmDecoderLayer"}))
        return replace(recipe, mlp_norm=None, parallel=True) if config.use_parallel_residual else recipe


class Starcoder2Adapter(LlamaAdapter):
    """StarCoder 2. Its MLP has no gate."""

    layout = replace(LlamaAdapter.layout, windows="all")

    def embed(self, parts: Parts, token_embeddings: Tensor, position_ids: Tensor) -> Tensor:
        """Drop some of the embeddings in training, which no module of their own does."""
        return functional.dropout(token_embeddings, parts.config.embedding_dropout, parts.model.training)

    def recipe(self, config: Any) -> Recipe:
        """Return LLaMA's recipe with another MLP."""
        layers = frozenset({"Starcoder2DecoderLayer"})
        return replace(super().recipe(config), layers=layers, gate=None, up="mlp.c_fc", down="mlp.c_proj")
