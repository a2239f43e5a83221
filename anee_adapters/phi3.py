"""Phi-3 and Phi-4: LLaMA with fused projections."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from anee_adapters.llama import LlamaAdapter
from anee_core.interfaces import Layout


class Phi3Adapter(LlamaAdapter):
    """Phi-3, with or without a sliding window; with LongRoPE up to the length that its short factors are made for."""

    layout: ClassVar[Layout] = replace(
        LlamaAdapter.layout, key=None, value=None, fused="self_attn.qkv_proj", windows="all"
    )
