"""Why some models cannot be run exactly, whatever an adapter says: what their configs tell."""

from __future__ import annotations

from typing import Any

_SEEN = frozenset({"attention", "full_attention", "sliding_attention"})
"""Kinds of layers whose tokens see all that is before them, or a window of it."""
_BIASED = frozenset({"bloom", "mpt"})
"""Families that tell tokens' places by ALiBi alone."""


def unservable(config: Any) -> str | None:
    """Return why no adapter could run a model with this config exactly, or None if its config shows no reason."""
    if not getattr(config, "is_causal", True):
        return "is_causal=False lets tokens see the future: what a layer computed for one would change with the next"
    if getattr(config, "add_cross_attention", False):
        return "add_cross_attention=True needs an encoder's states; ANEE runs decoder-only models"
    if config.model_type in _BIASED:
        return (
            "it places tokens by ALiBi, a bias that transformers makes as if every layer held every token, so it "
            "cannot follow a cache whose layers hold different tokens"
        )
    for kind in getattr(config, "layer_types", None) or ():
        if kind == "chunked_attention":
            return "layers of the kind 'chunked_attention' let a token see its own chunk only; ANEE knows windows only"
        if kind not in _SEEN:
            return f"layers of the kind '{kind}' keep no key/value cache that ANEE could share between tokens"
    shared = getattr(config, "num_kv_shared_layers", None)
    if shared:
        return f"num_kv_shared_layers={shared}: layers attend to what others stored, and others may have been skipped"
    width = getattr(config, "hidden_size_per_layer_input", None)
    if width:
        return f"hidden_size_per_layer_input={width}: each layer is given an embedding of its own beside hidden states"
    return None


def keeps_state(network: Any, config: Any) -> bool:
    """Whether layers of a transformers model, or of its class, keep a state of their own beside keys and values.

    Of families that have both kinds of layers, it is a config's ``layer_types`` that says so.
    """
    kinds = getattr(config, "layer_types", None)
    return network._is_stateful and not (kinds and _SEEN.issuperset(kinds))
