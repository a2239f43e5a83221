"""DBRX: attention between two norms, and experts whose matrices are stacked in two dimensions."""

from __future__ import annotations

from dataclasses import replace

from anee_core.accounting.work import Work, layer_work, stored_bytes
from anee_core.adapter.layout import find
from anee_core.interfaces import Layout, ModelAdapter, Parts


class DbrxAdapter(ModelAdapter):
    """DBRX. Keys may be clipped, so a layer that is skipped is called up to its cache."""

    layout = Layout(
        layers="transformer.blocks",
        final_norm="transformer.norm_f",
        rotary="transformer.rotary_emb",
        attention="norm_attn_norm.attn",
        mlp="ffn",
        experts="ffn.experts.mlp",
    )

    def layer_work(self, parts: Parts, layer_idx: int) -> Work:
        """Count the experts that a token is routed to, which the shapes of their weights do not tell."""
        layer, routing = parts.layers[layer_idx], parts.config.ffn_config
        work = layer_work(layer, None, parts.config)
        weights = list(find(layer, "ffn.experts.mlp").parameters())
        held, numbers = sum(map(stored_bytes, weights)), sum(weight.numel() for weight in weights)
        return replace(
            work,
            flops=work.flops + 2 * numbers * routing.moe_top_k // routing.moe_num_experts,
            weight_bytes=work.weight_bytes - held,
            token_bytes=held * routing.moe_top_k // routing.moe_num_experts,
            table_bytes=held,
        )
