"""Seeded tiny models of every family, and ragged batches to feed them."""

from __future__ import annotations

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

import anee
from anee_core.interfaces import Calibration
from anee_core.model import AdaptiveModel
from anee_core.plugins import Plugins

VOCABULARY = 97
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}

FAMILIES = {
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=6, n_head=4, n_positions=128, **SPECIAL)
    ),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, **SPECIAL)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE, **SPECIAL)),
    "qwen2-sliding": lambda: Qwen2ForCausalLM(
        Qwen2Config(**SHAPE, **SPECIAL, use_sliding_window=True, sliding_window=5, max_window_layers=2)
    ),
}


def build(family, attention="sdpa", dtype=torch.float32):
    """Return a tiny transformers model with weights large enough that every layer matters."""
    torch.manual_seed(sum(map(ord, family)))
    model = FAMILIES[family]()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
            elif name.endswith("bias"):
                parameter.normal_(std=0.1)
    model.set_attn_implementation(attention)
    return model.to(dtype).eval()


PLUGINS = Plugins.discover()


def adaptive(model, policy="dense", budget=None, **options) -> AdaptiveModel:
    """Load a model under a policy, with a made-up calibration where one is needed."""
    layers = model.config.num_hidden_layers
    generator = torch.Generator().manual_seed(3)
    calibration = Calibration(torch.rand(layers, generator=generator), torch.linspace(0, 1, 101), "made up", "made up")
    options.setdefault("calibration", calibration)
    return anee.load(model, policy, budget, plugins=PLUGINS, **options)


def tokens(batch=2, length=11, seed=0):
    """Return random token ids [B, T] without the special ones."""
    return torch.randint(2, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def ragged(lengths, side, extra=0):
    """Return ids and mask [B, T] of rows with these lengths, padded on one side, by ``extra`` more than needed."""
    width = max(lengths) + extra
    ids, mask = torch.zeros(len(lengths), width, dtype=torch.long), torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        at = slice(width - length, width) if side == "left" else slice(0, length)
        ids[row, at] = tokens(1, length, seed=row + 1)[0]
        mask[row, at] = 1
    return ids, mask


def stepwise(model, ids, mask=None):
    """Return logits [B, T, V] of decoding a sequence one token at a time."""
    cache, parts = model.new_cache(), []
    for t in range(ids.shape[1]):
        seen = None if mask is None else mask[:, : t + 1]
        parts.append(model(ids[:, t : t + 1], attention_mask=seen, past_key_values=cache).logits)
    return torch.cat(parts, dim=1)


POLICIES = {
    "dense": ("dense", None),
    "static": ("static:skip=1 3", None),
    "static, first and last": ("static:skip=0 5", None),
    "static, exit": ("static:exit=4", None),
    "static, calibrated": ("static:protect=1 1", 0.7),
    "random": ("random:p=0.5,protect=0 0", None),
    "random, exit": ("random:p=0.3,exit=0.2,protect=1 1", None),
    "heuristic": ("heuristic:protect=1 1", 0.7),
    "heuristic, exit": ("heuristic:protect=1 1,exit=0.3,spread=0.2", 0.7),
    "window": ("window:sinks=1,recent=4", None),
    "random and window": ("random:p=0.5,protect=0 0+window:sinks=1,recent=4", None),
    "heuristic and window": ("heuristic:protect=1 1+window:sinks=1,recent=4", 0.7),
}
