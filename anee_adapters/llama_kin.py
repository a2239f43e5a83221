"""Families without experts that differ from LLaMA in names, norms, windows and numbers of their configs.

Key and value projections are named where keys are no more than projected, normed per head and then turned. Else a
skipped layer is called up to its cache, which is right for all of them and costs the queries too.
"""

from __future__ import annotations

from dataclasses import replace

from anee_adapters.llama import LlamaAdapter
from anee_adapters.neighbours import NeighboursAdapter
from anee_adapters.table import TableAdapter
from anee_core.interfaces import ModelAdapter, Recipe

LLAMA = LlamaAdapter.layout
CALLED = replace(LLAMA, key=None, value=None)
"""LLaMA's layout where keys are more than projected and turned."""


def llama_kin() -> dict[str, ModelAdapter]:
    """Return the adapters by model type."""
    after = replace(CALLED, input_norm=None)  # norms behind attention and MLP only; keys are normed too
    granite = replace(LLAMA, embedding_multiplier="embedding_multiplier", logits_divisor="logits_scaling")
    scaled = replace(CALLED, logits_multiplier="logit_scale")
    glm4 = replace(
        _fused_recipe("Glm4DecoderLayer"), attended_norm="post_self_attn_layernorm", changed_norm="post_mlp_layernorm"
    )
    return {
        "apertus": TableAdapter(replace(LLAMA, input_norm="attention_layernorm", key_norm="self_attn.k_norm")),
        "arcee": TableAdapter(LLAMA),
        "bitnet": TableAdapter(LLAMA),
        "cohere": TableAdapter(scaled),
        "cohere2": TableAdapter(replace(scaled, windows="by type")),  # layers without a window turn no keys
        "ernie4_5": NeighboursAdapter(LLAMA, _recipe("Ernie4_5DecoderLayer", rotary_pairs=True)),
        "exaone4": TableAdapter(replace(after, windows="by type")),  # layers without a window may turn no keys
        "glm": NeighboursAdapter(LLAMA, _fused_recipe("GlmDecoderLayer")),
        "glm4": NeighboursAdapter(LLAMA, glm4),
        "granite": TableAdapter(granite),
        "helium": NeighboursAdapter(LLAMA, _recipe("HeliumDecoderLayer", rotary_pairs=True)),
        "hunyuan_v1_dense": TableAdapter(CALLED),  # keys are turned and then normed
        "ministral": TableAdapter(replace(LLAMA, windows="by type"), _recipe("MinistralDecoderLayer")),
        "ministral3": TableAdapter(replace(LLAMA, windows="all")),  # queries grow with their positions
        "nemotron": TableAdapter(LLAMA),
        "olmo": TableAdapter(CALLED),  # keys may be clipped
        "olmo2": TableAdapter(after),
        "olmo3": TableAdapter(replace(after, windows="by type")),
        "persimmon": TableAdapter(replace(CALLED, final_norm="model.final_layernorm")),  # one interleaved projection
        "seed_oss": TableAdapter(LLAMA, _recipe("SeedOssDecoderLayer")),
        "smollm3": TableAdapter(replace(CALLED, windows="by type")),  # some layers turn no keys
    }


def _recipe(layer: str, rotary_pairs: bool = False) -> Recipe:
    """Return LLaMA's recipe, for another class of layers."""
    return replace(LlamaAdapter().recipe(None), layers=frozenset({layer}), rotary_pairs=rotary_pairs)


def _fused_recipe(layer: str) -> Recipe:
    """Return the recipe of layers that turn neighbours, with the MLP's two inputs in one projection."""
    return replace(_recipe(layer, rotary_pairs=True), gate=None, up=None, gate_up="mlp.gate_up_proj")
