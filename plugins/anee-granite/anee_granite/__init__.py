"""IBM Granite for ANEE: scaled embeddings, scaled logits, and names like LLaMA's."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from anee_core.hookspecs import hookimpl
from anee_core.interfaces import Layout, ModelAdapter, Parts


class GraniteAdapter(ModelAdapter):
    """Granite 2 and 3, dense."""

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

    def embed(self, parts: Parts, token_embeddings: Tensor, position_ids: Tensor) -> Tensor:
        """Scale the embeddings, as Granite does in front of its layers."""
        return token_embeddings * parts.config.embedding_multiplier

    def logits(self, parts: Parts, hidden_states: Tensor) -> Tensor:
        """Scale the logits, as Granite does behind its head."""
        return super().logits(parts, hidden_states) / parts.config.logits_scaling


@hookimpl
def anee_adapters() -> Mapping[str, ModelAdapter]:
    """Return the adapter by the model type it serves."""
    return {"granite": GraniteAdapter()}
