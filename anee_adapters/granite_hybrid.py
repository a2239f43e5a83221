"""Granite 4 without state-space layers: Granite with a shared MLP, experts or none, and rotary positions or none."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from anee_adapters.llama import LlamaAdapter
from anee_core.interfaces import Layout, ModelAdapter, Parts


class GraniteHybridAdapter(ModelAdapter):
    """Granite 4. Configs with state-space layers are refused: a skipped token would not enter their state."""

    layout = replace(
        LlamaAdapter.layout,
        mlp="shared_mlp",
        embedding_multiplier="embedding_multiplier",
        logits_divisor="logits_scaling",
    )

    def layout_for(self, config: Any) -> Layout:
        """Name the experts if there are any, and leave out rotary positions if there are none."""
        return replace(
            self.layout,
            experts="block_sparse_moe" if config.num_local_experts else None,
            rotary=self.layout.rotary if config.position_embedding_type == "rope" else None,
        )

    def position_limit(self, parts: Parts) -> int | None:
        """Return None without rotary positions: then nothing says where a token stands, and no place is the last."""
        return None if parts.rotary is None else super().position_limit(parts)
