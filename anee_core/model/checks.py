"""What a model must be for ANEE to run it."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from anee_core.adapter.layout import Parts, attention_backend
from anee_core.adapter.model_adapter import ModelAdapter
from anee_core.adapter.refusals import keeps_state
from anee_core.errors import InputError, ModelError
from anee_core.ranges import MOST, Within, check_kind

Prefill = Literal["auto", "adaptive", "dense"]

_IGNORED = -100
"""Label of a token that is not to be predicted, as in transformers."""


def causal_lm(model: nn.Module) -> nn.Module:
    """Return the transformers model inside ``model``: itself, or what PEFT wraps."""
    unwrap = getattr(model, "get_base_model", None)
    inner: nn.Module = unwrap() if unwrap is not None else model
    return inner


def check_prefill(prefill: str, chunk: int) -> None:
    """Raise `InputError` unless these say how to read a prompt."""
    Within(1, MOST).check("prefill_chunk", chunk)
    if prefill not in get_args(Prefill):
        raise InputError(f"prefill is 'auto', 'adaptive' or 'dense'; got '{prefill}'")


def check_tokenizer(tokenizer: Any) -> None:
    """Raise `InputError` for what turns no text into tokens and back."""
    if tokenizer is not None and not (callable(tokenizer) and hasattr(tokenizer, "decode")):
        raise InputError(f"tokenizer is one of transformers, or None; got {type(tokenizer).__name__}")


def check_labels(labels: Any, logits: Tensor) -> None:
    """Raise `InputError` unless labels are ids [B, T], or -100, for logits [B, T, V]; values are read on a CPU only."""
    check_kind("labels", labels, Tensor, "a tensor [batch, tokens]")
    if labels.shape != logits.shape[:2] or labels.dtype != torch.long:
        raise InputError(
            f"labels are torch.int64 token ids [{logits.shape[0]}, {logits.shape[1]}]; "
            f"got {labels.dtype} {tuple(labels.shape)}"
        )
    if labels.is_cpu:
        wrong = labels[(labels >= logits.shape[2]) | ((labels < 0) & (labels != _IGNORED))]
        if wrong.numel():
            raise InputError(
                f"label {int(wrong[0])} is not in the vocabulary of {logits.shape[2]}; {_IGNORED} stands for none"
            )


def check_kept(places: Any, tokens: int) -> None:
    """Raise `InputError` unless ``places`` are how many last positions to return logits of, or their indices [N]."""
    if isinstance(places, Tensor) and places.dim() == 1 and places.dtype in (torch.int32, torch.long):
        if places.numel() and not -tokens <= int(places.min()) <= int(places.max()) < tokens:
            raise InputError(f"logits_to_keep has indices of {tokens} tokens; got {places.tolist()!s:.60}")
        return
    if isinstance(places, bool) or not isinstance(places, int) or places < 0:
        raise InputError("logits_to_keep takes a number of last positions, 0 for all, or their indices [N]")


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
