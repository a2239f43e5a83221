"""A model against transformers on its own weights, once, before it is trusted."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from anee_core.adapter.cache_names import CACHE
from anee_core.adapter.model_adapter import ModelAdapter
from anee_core.conformance.check import MismatchError, expect_same
from anee_core.conformance.subject import CLOSE, LOOSE, shortened
from anee_core.controllers.static import StaticController
from anee_core.errors import ModelError
from anee_core.model.adaptive_model import AdaptiveModel
from anee_core.policy.policy import Policy

_TOKENS, _BEYOND, _LONGEST = 40, 8, 1024
"""Tokens that are read, more if a window is shorter than the longest: so many beyond it."""


@torch.no_grad()
def check_real_weights(network: Any, adapter: ModelAdapter) -> None:
    """Raise `ModelError` unless a model whose family has no adapter computes what transformers does, on real weights.

    It reads forty tokens, or some more than its shortest window; then keys and values of a layer that is skipped, and
    the model without one layer, are compared.
    """
    parts = adapter.parts(network)
    windows = [width for i in range(len(parts.layers)) if (width := adapter.window(parts.config, i)) is not None]
    length = max([_TOKENS, *(width + _BEYOND for width in windows if width + _BEYOND <= _LONGEST)])
    length = min(length, adapter.max_positions(parts.config) or length)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, parts.config.vocab_size, (1, length), generator=generator).to(parts.embedding.weight.device)
    tolerance = CLOSE if network.dtype == torch.float32 else LOOSE
    mode = network.training
    network.eval()
    try:
        theirs = network(ids, use_cache=True, output_hidden_states=True)
        probe = AdaptiveModel(network, adapter)
        expect_same(probe(ids).logits, theirs.logits, f"logits of {length} tokens", "ModelAdapter.embed", tolerance)
        layer_idx = len(parts.layers) // 2
        states, positions = theirs.hidden_states[layer_idx], torch.arange(length, device=ids.device)[None]
        call = adapter.begin(parts, theirs.hidden_states[0], positions)[layer_idx]
        if adapter.window(parts.config, layer_idx) is None:
            found, kept = adapter.project_kv(parts, layer_idx, states, call), theirs[CACHE].layers[layer_idx]
            for name, mine, other in zip(("keys", "values"), found, (kept.keys, kept.values), strict=True):
                expect_same(mine, other, f"{name} of layer {layer_idx}", "ModelAdapter.project_kv", tolerance)
        skipped = AdaptiveModel(network, adapter).set_policy(Policy(StaticController(skip=(layer_idx,))))
        shorter = _without(network, parts.layout.layers, layer_idx)
        expect_same(
            skipped(ids).logits, shorter(ids, use_cache=False).logits, f"logits without layer {layer_idx}",
            "ModelAdapter.run", tolerance,
        )  # fmt: skip
    except MismatchError as error:
        raise ModelError(
            f"no adapter for the model family '{parts.config.model_type}', and as it looks it computes something else "
            f"on these weights: {error}"
        ) from error
    finally:
        network.train(mode)


def _without(model: Any, path: str, layer_idx: int) -> Any:
    """Return a model that shares all weights and modules with another one, but for one decoder layer."""
    smaller = _sharing(model)
    config = shortened(model.config, {layer_idx})
    smaller.config, parent = config, smaller
    *above, own = path.split(".")
    for name in above:
        child = parent._modules[name] = _sharing(parent._modules[name])
        if hasattr(child, "config"):
            child.config = config
        parent = child
    parent._modules[own] = nn.ModuleList(m for i, m in enumerate(parent._modules[own]) if i != layer_idx)
    return smaller


def _sharing(module: Any) -> Any:
    """Return a module with the same parts, of which others can be put in without changing the first."""
    other = copy.copy(module)
    other._modules = dict(module._modules)
    return other
