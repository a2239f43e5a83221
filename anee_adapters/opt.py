"""OPT: learned positions with an offset, projections around the layers, and norms before or after them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from anee_core.interfaces import Layout, ModelAdapter, Parts, Recipe


class OPTAdapter(ModelAdapter):
    """OPT of any size. OPT-350m has its norms after attention and MLP, none at the end, and a narrower embedding."""

    layout = Layout(
        layers="model.decoder.layers",
        final_norm="model.decoder.final_layer_norm",
        learned_positions="model.decoder.embed_positions",
        attention="self_attn",
        input_norm="self_attn_layer_norm",
        key="self_attn.k_proj",
        value="self_attn.v_proj",
    )

    def layout_for(self, config: Any) -> Layout:
        """Leave out the norms that are not where they usually are."""
        layout = self.layout
        if not config.do_layer_norm_before:
            layout = replace(layout, input_norm=None, final_norm=None)
        return replace(layout, final_norm=None) if config._remove_final_layer_norm else layout

    def recipe(self, config: Any) -> Recipe | None:
        """Return the recipe of layers with their norms in front; others have none."""
        if not config.do_layer_norm_before:
            return None
        return Recipe(
            layers=frozenset({"OPTDecoderLayer"}),
            query="self_attn.q_proj",
            output="self_attn.out_proj",
            mlp_norm="final_layer_norm",
            up="fc1",
            down="fc2",
            activation="activation_function",
        )

    def parts(self, model: Any) -> Parts:
        """Count the projection to a narrower embedding as part of the final norm."""
        parts = super().parts(model)
        leave = model.model.decoder.project_out
        return parts if leave is None else replace(parts, final_norm=nn.Sequential(parts.final_norm, leave))

    def embed(self, parts: Parts, token_embeddings: Tensor, position_ids: Tensor) -> Tensor:
        """Widen a narrower embedding, and name the positions: their table wants a padding mask first."""
        enter = parts.model.model.decoder.project_in
        states = token_embeddings if enter is None else enter(token_embeddings)
        return states + parts.learned_positions(None, position_ids=position_ids).to(states.device)
