"""Qwen2 and Qwen3, dense and as a mixture of experts."""

from __future__ import annotations

from dataclasses import replace

from anee_adapters.llama import LlamaAdapter


class Qwen2Adapter(LlamaAdapter):
    """Qwen2: LLaMA with a sliding window in some layers, if its config says so."""

    layout = replace(LlamaAdapter.layout, windows="by type")


class Qwen3Adapter(Qwen2Adapter):
    """Qwen3: Qwen2 with a norm over each head's keys."""

    layout = replace(Qwen2Adapter.layout, key_norm="self_attn.k_norm")


class Qwen3MoeAdapter(Qwen3Adapter):
    """Qwen3 with experts in some layers or all. A window, if it has one, is in every layer."""

    layout = replace(Qwen3Adapter.layout, experts="mlp.experts", windows="all")
