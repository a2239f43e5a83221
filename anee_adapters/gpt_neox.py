"""GPT-NeoX and Pythia: partial rotary positions, queries, keys and values interleaved head by head."""

from __future__ import annotations

from typing import ClassVar

from anee_core.interfaces import Layout, ModelAdapter


class GPTNeoXAdapter(ModelAdapter):
    """GPT-NeoX, parallel or sequential. A skipped layer asks the layer itself for keys and values."""

    layout: ClassVar[Layout] = Layout(
        layers="gpt_neox.layers",
        final_norm="gpt_neox.final_layer_norm",
        rotary="gpt_neox.rotary_emb",
        attention="attention",
        mlp="mlp",
        cache_argument="layer_past",
    )
