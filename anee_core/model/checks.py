"""What a model must be for ANEE to run it."""

from __future__ import annotations

from typing import Any, Literal, get_args

from torch import nn

from anee_core.adapter.layout import Parts, attention_backend
from anee_core.adapter.model_adapter import ModelAdapter
from anee_core.adapter.refusals import keeps_state
from anee_core.errors import InputError, ModelError

Prefill = Literal["auto", "adaptive", "dense"]


def causal_lm(model: nn.Module) -> nn.Module:
    """Return the transformers model inside ``model``: itself, or what PEFT wraps."""
    unwrap = getattr(model, "get_base_model", None)
    inner: nn.Module = unwrap() if unwrap is not None else model
    return inner


def check_prefill(prefill: str, chunk: int) -> None:
    """Raise `InputError` unless these say how to read a prompt."""
    if chunk < 1:
        raise InputError(f"prefill_chunk is at least 1; got {chunk}")
    if prefill not in get_args(Prefill):
        raise InputError(f"prefill is 'auto', 'adaptive' or 'dense'; got '{prefill}'")


def check_family(model: Any, adapter: ModelAdapter) -> None:
    """Raise `ModelError` for a model that cannot be run whatever its parts are called."""
    reason = adapter.refuse(model.config)
    if reason is not None:
        raise ModelError(f"{type(model).__name__} with this config is not supported: {reason}")
    if keeps_state(model, model.config):
        raise ModelError(
            f"layers of {type(model).__name__} keep no key/value cache but a state of their own, which a skipped token "
            "would not enter: ANEE cannot run this family"
        )


def check_runnable(parts: Parts) -> None:
    """Raise `ModelError` for a model whose modules cannot be run as they are."""
    attention_backend(parts.config)
    if parts.head is None:
        raise ModelError(f"{type(parts.model).__name__} has no language-model head; load it with AutoModelForCausalLM")
    for name, parameter in parts.model.named_parameters():
        if parameter.device.type == "meta":
            raise ModelError(f"weight '{name}' is not in memory (offloaded or never loaded); load the whole model")


def check_training(parts: Parts) -> None:
    """Raise `InputError` for a model that leaves out whole layers at random while it trains."""
    if parts.model.training and getattr(parts.config, "layerdrop", 0):
        raise InputError(
            f"in training this model leaves out layers at random (config.layerdrop is {parts.config.layerdrop:g}), "
            "which a policy cannot take into account: set model.config.layerdrop = 0, or call model.eval()"
        )
