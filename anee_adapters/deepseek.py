"""DeepSeek-V3: keys and values from one narrow projection, and experts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from anee_adapters.llama import LlamaAdapter
from anee_core.accounting.work import Work
from anee_core.adapter.layout import find
from anee_core.interfaces import ModelAdapter, Parts

_WIDENED = "self_attn.kv_b_proj"


class DeepseekV3Adapter(ModelAdapter):
    """DeepSeek-V3. Since transformers 5.24 the cache holds the narrow states, which each call widens for all slots."""

    layout = replace(LlamaAdapter.layout, key=None, value=None, experts="mlp.experts")

    def head_dim(self, config: Any) -> int:
        """Return the width of a query's head."""
        width: int = config.qk_nope_head_dim + config.qk_rope_head_dim
        return width

    def attention_width(self, config: Any) -> int:
        """Return half of the widths of all heads' keys and values together: they differ."""
        heads: int = config.num_attention_heads
        return heads * (self.head_dim(config) + config.v_head_dim) // 2

    def layer_work(self, parts: Parts, layer_idx: int) -> Work:
        """Leave out what is done for each slot, and not for each token."""
        work = super().layer_work(parts, layer_idx)
        return replace(work, flops=work.flops - self.slot_flops(parts))

    def slot_flops(self, parts: Parts) -> int:
        """Return what widening a slot's states takes, where the cache holds them."""
        if not hasattr(find(parts.layers[0], "self_attn"), "expand_kv"):
            return 0
        weight = find(parts.layers[0], _WIDENED)._parameters["weight"]
        return 0 if weight is None else 2 * weight.numel()
