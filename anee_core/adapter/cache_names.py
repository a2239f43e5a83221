"""What transformers calls the cache: ``past_key_values`` up to version 5.23, ``cache`` from 5.24 on."""

from __future__ import annotations

import inspect
from dataclasses import fields
from typing import Any

from torch import nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from anee_core.errors import InputError

CACHE = "cache" if "cache" in {item.name for item in fields(CausalLMOutputWithPast)} else "past_key_values"
"""The name that the installed version gives it, in a model's arguments and outputs."""

LAYER_ARGUMENTS = ("cache", "past_key_values", "layer_past", "past_key_value")
"""What decoder layers call it, in one family and version or another."""


def layer_argument(layer: nn.Module) -> str | None:
    """Return which of a layer's arguments carries the cache; None if it has none of these names."""
    taken = inspect.signature(type(layer).forward).parameters
    return next((name for name in LAYER_ARGUMENTS if name in taken), None)


def one_cache(cache: Any, past_key_values: Any) -> Any:
    """Return the cache given under either name, or None.

    Raises:
        InputError: there are two.
    """
    if cache is not None and past_key_values is not None:
        raise InputError("cache and past_key_values are two names of one thing: give one of them")
    return past_key_values if cache is None else cache
