"""Mixtures of experts whose layers are called as LLaMA's are."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

from anee_adapters.llama_kin import CALLED, LLAMA
from anee_adapters.neighbours import NeighboursAdapter
from anee_adapters.table import TableAdapter
from anee_core.accounting.work import Work, layer_work
from anee_core.interfaces import ModelAdapter, Parts


class PhimoeAdapter(TableAdapter):
    """Phi-3.5-MoE, whose router takes two experts whatever ``num_experts_per_tok`` says."""

    def layer_work(self, parts: Parts, layer_idx: int) -> Work:
        """Count two experts for each token."""
        return layer_work(parts.layers[layer_idx], parts.layout.experts, SimpleNamespace(num_experts_per_tok=2))


def mixtures() -> dict[str, ModelAdapter]:
    """Return the adapters by model type."""
    llama, called = (replace(layout, experts="mlp.experts") for layout in (LLAMA, CALLED))
    granite = replace(
        LLAMA,
        mlp="block_sparse_moe",
        experts="block_sparse_moe",
        embedding_multiplier="embedding_multiplier",
        logits_divisor="logits_scaling",
    )
    return {
        "ernie4_5_moe": NeighboursAdapter(llama),
        "glm4_moe": TableAdapter(called),  # keys may be normed
        "gpt_oss": TableAdapter(replace(called, windows="by type")),  # the model gives each angle once
        "granitemoe": TableAdapter(granite),
        "minimax_m2": TableAdapter(called),  # keys of all heads are normed together
        "olmoe": TableAdapter(called),  # keys of all heads are normed together, and may be clipped
        "phimoe": PhimoeAdapter(replace(llama, windows="all")),
        "qwen2_moe": TableAdapter(replace(llama, windows="by type")),
    }
