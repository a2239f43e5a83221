"""The layout of a family that nobody has adapted, as a model of it looks."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from anee_core.adapter.cache_names import LAYER_ARGUMENTS, layer_argument
from anee_core.adapter.layout import Layout
from anee_core.adapter.model_adapter import ModelAdapter
from anee_core.adapter.refusals import keeps_state
from anee_core.errors import AdapterError

_PASSED = (*LAYER_ARGUMENTS, "attention_mask", "position_ids", "position_embeddings", "use_cache", "hidden_states")
_NUMBERS = {
    "embedding_multiplier": "embedding_multiplier",
    "logit_scale": "logits_multiplier",
    "logits_scaling": "logits_divisor",
    "final_logit_softcapping": "logits_cap",
}
"""Fields of a `Layout` by the attributes of configs that transformers' families name so."""


class GuessedAdapter(ModelAdapter):
    """An adapter whose layout was found by looking at a model."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout


def guess_layout(model: Any) -> Layout:
    """Return the layout of a causal LM as its modules and its config show it, with those parts only that are needed.

    What cannot be seen, like a factor in the model's own forward, is not there: what is returned has to be checked.

    Raises:
        AdapterError: the model's layers cannot be run one by one with a cache.
    """
    config = model.config
    path, layers = next(
        ((name, found) for name, found in _lists(model) if len(found) == config.num_hidden_layers), ("", None)
    )
    if layers is None:
        raise AdapterError(f"{type(model).__name__} has no list of {config.num_hidden_layers} decoder layers")
    attention = _attention(model, layers[0])
    above, _, own = path.rpartition(".")
    beside = [(n, m) for n, m in model.get_submodule(above).named_children() if n != own]
    named = {
        "final_norm": [n for n, _ in beside if "norm" in n.lower() or re.fullmatch(r"ln_\w+", n)],
        "rotary": [n for n, m in beside if "rotary" in type(m).__name__.lower()],
        "learned_positions": [
            n for n, m in beside if isinstance(m, nn.Embedding) and m is not model.get_input_embeddings()
        ],
        "embedding_dropout": [n for n, m in beside if isinstance(m, nn.Dropout)],
    }
    found: dict[str, Any] = {field: f"{above}.{names[-1]}" for field, names in named.items() if names}
    found |= {field: name for name, field in _NUMBERS.items() if getattr(config, name, None) is not None}
    experts = {n.rpartition(".")[0] for item in layers for n, p in item.named_parameters() if p.dim() > 2}
    if experts:
        found["experts"] = min(experts, key=len)
    kinds = getattr(config, "layer_types", None) or ()
    if "sliding_attention" in kinds:
        found["windows"] = "by type"
    elif getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        found["windows"] = "all"
    return Layout(layers=path, attention=attention, **found)


def _lists(model: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    """Yield the module lists of a model by their paths."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList))


def _attention(model: Any, layer: nn.Module) -> str:
    """Return the name of a layer's attention, if the layer can be called as ANEE calls layers."""
    kind = type(layer).__name__
    attention = next((n for n, child in layer.named_children() if "attention" in type(child).__name__.lower()), None)
    if layer_argument(layer) is None or attention is None or keeps_state(model, model.config):
        raise AdapterError(f"layers of the kind {kind} take no key/value cache: ANEE cannot run this family")
    parameters = inspect.signature(type(layer).forward).parameters.values()
    required = [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    unknown = [name for name in required[2:] if name not in _PASSED]
    if unknown:
        raise AdapterError(
            f"layers of the kind {kind} must be given '{unknown[0]}', which ANEE does not know: a bias such as ALiBi's "
            "cannot follow a cache whose layers hold different tokens; for anything else, override layer_arguments"
        )
    return attention
