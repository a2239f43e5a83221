"""Models of well-known sizes with random weights: for speed, weights need not be trained."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig


def _gpt2(layers: int, width: int, heads: int) -> GPT2Config:
    return GPT2Config(n_layer=layers, n_embd=width, n_head=heads, n_positions=4096)


SIZES: dict[str, Any] = {
    "gpt2-small": lambda: _gpt2(12, 768, 12),
    "gpt2-medium": lambda: _gpt2(24, 1024, 16),
    "gpt2-large": lambda: _gpt2(36, 1280, 20),
    "gpt2-xl": lambda: _gpt2(48, 1600, 25),
    "llama-1.1b": lambda: LlamaConfig(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32, num_key_value_heads=4,
        vocab_size=32000, max_position_embeddings=4096,
    ),
}  # fmt: skip
"""Functions that make the config of each size, by its name."""


def build(size: str, dtype: torch.dtype = torch.float32) -> Any:
    """Return a model of a size with seeded random weights, ready to run."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(SIZES[size](), dtype=dtype).eval()
