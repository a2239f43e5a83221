"""nanochat for ANEE: a norm in front of the layers, capped logits, and names like LLaMA's."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from anee_core.hookspecs import hookimpl
from anee_core.interfaces import Layout, ModelAdapter, Parts


class NanoChatAdapter(ModelAdapter):
    """nanochat. Its keys are turned before they are normed, so a layer that is skipped is called up to its cache."""

    layout = Layout(
        layers="model.layers",
        final_norm="model.norm",
        rotary="model.rotary_emb",
        attention="self_attn",
        mlp="mlp",
        input_norm="input_layernorm",
    )

    def embed(self, parts: Parts, token_embeddings: Tensor, position_ids: Tensor) -> Tensor:
        """Norm the embeddings, as nanochat does by the norm behind its layers."""
        normed: Tensor = parts.final_norm(token_embeddings)
        return normed

    def logits(self, parts: Parts, hidden_states: Tensor) -> Tensor:
        """Cap the logits, as nanochat does behind its head (``Layout.logits_cap`` would do the same)."""
        logits, cap = super().logits(parts, hidden_states), parts.config.final_logit_softcapping
        return logits if cap is None else torch.tanh(logits / cap) * cap


@hookimpl
def anee_adapters() -> Mapping[str, ModelAdapter]:
    """Return the adapter by the model type it serves."""
    return {"nanochat": NanoChatAdapter()}
