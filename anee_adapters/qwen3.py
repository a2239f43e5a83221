"""Qwen3, dense and as a mixture of experts."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from anee_adapters.llama import LlamaAdapter
from anee_core.interfaces import Layout


class Qwen3Adapter(LlamaAdapter):
    """Qwen3: LLaMA with a norm over each head's keys."""

    layout: ClassVar[Layout] = replace(LlamaAdapter.layout, key_norm="self_attn.k_norm")


class Qwen3MoeAdapter(Qwen3Adapter):
    """Qwen3 with experts in some layers or all."""

    layout: ClassVar[Layout] = replace(Qwen3Adapter.layout, experts="mlp.experts")
