"""Mistral, and its mixture of experts Mixtral."""

from __future__ import annotations

from dataclasses import replace

from anee_adapters.llama import LlamaAdapter


class MistralAdapter(LlamaAdapter):
    """Mistral: LLaMA with a sliding window in every layer, unless its config says ``sliding_window=None``."""

    layout = replace(LlamaAdapter.layout, windows="all")


class MixtralAdapter(MistralAdapter):
    """Mixtral: Mistral with experts for its MLP."""

    layout = replace(MistralAdapter.layout, experts="mlp.experts")
