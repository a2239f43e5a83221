"""GPT-2: learned positions, one fused projection for queries, keys and values."""

from __future__ import annotations

from typing import ClassVar

from anee_core.interfaces import Layout, ModelAdapter


class GPT2Adapter(ModelAdapter):
    """GPT-2 of any size."""

    layout: ClassVar[Layout] = Layout(
        layers="transformer.h",
        final_norm="transformer.ln_f",
        learned_positions="transformer.wpe",
        attention="attn",
        mlp="mlp",
        input_norm="ln_1",
        fused="attn.c_attn",
    )
