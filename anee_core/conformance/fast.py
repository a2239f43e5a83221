"""Checks that the fast layer step gives what the model's own modules give."""

from __future__ import annotations

import torch
from torch import Tensor

from anee_core.conformance.check import check, expect, expect_same
from anee_core.conformance.subject import CLOSE, LOOSE, Subject
from anee_core.model.adaptive_model import AdaptiveModel
from anee_core.steps.deferred import DeferredStep
from anee_core.steps.native.step import NativeStep

_FAST = (1e-4, 1e-3)
"""Absolute and relative tolerance in fp32, where sums are taken in another order."""
_POLICIES = (
    "dense",
    "static:skip=1 3",
    "random:p=0.5,protect=0 0+shortcuts",
    "random:p=0.4,exit=0.2,protect=0 0+window:sinks=1,recent=4",
    "tova:keep=6",
)


@check("fast step", look="ModelAdapter.recipe and angles: what the layer computes, and the paths of its parts")
def fast_step(subject: Subject) -> None:
    """Under every policy the fast step gives the logits of the model's own modules, alone and in padded batches."""
    ids, mask = subject.ragged((7, 3), "left")
    more = subject.tokens(2, 6, seed=5)
    for policy in _POLICIES if _applies(subject) else _POLICIES[:1]:
        for dtype, tolerance in ((torch.float32, _FAST), (torch.bfloat16, LOOSE)):
            if dtype == torch.bfloat16 and policy != "dense":
                continue  # rounding turns decisions over
            wanted, found = (_decoded(subject, fast, policy, dtype, (ids, mask, more)) for fast in (False, True))
            expect_same(found, wanted, f"logits under '{policy}' ({dtype})", fast_step.look, tolerance)


@check("fast cache", look="ModelAdapter.recipe and angles: what the layer computes, and the paths of its parts")
def fast_cache(subject: Subject) -> None:
    """Rollback, reordering and growth find the keys and values that skipped layers are owed, as if they were there."""
    policy = "random:p=0.6,protect=0 0"
    ids, more = subject.tokens(2, 5), subject.tokens(2, 9, seed=3)
    outcomes = []
    for fast in (False, True):
        model = subject.adaptive(policy, fast=fast)
        if fast:  # however small the model
            step = DeferredStep(NativeStep(model.adapter, model.parts))
            model.use_step(step)
        cache = model.new_cache()
        with torch.no_grad():
            model(ids, past_key_values=cache)
            _feed(model, cache, more[:, :6])
            cache.rollback(2)
            _feed(model, cache, more[:, 4:6])
            cache.reorder(torch.tensor([1, 1, 0]))
            logits = _feed(model, cache, more[[1, 1, 0], 6:])
        outcomes.append((logits, [cache.keys_values(i) for i in range(subject.layers)]))
    (wanted, kept), (found, held) = outcomes
    expect_same(found, wanted, "logits after rollback and reordering", fast_cache.look, _FAST)
    for layer_idx, (theirs, ours) in enumerate(zip(kept, held, strict=True)):
        for name, other, mine in zip(("keys", "values"), theirs, ours, strict=True):
            expect_same(mine, other, f"{name} of layer {layer_idx}", fast_cache.look, CLOSE)


def _decoded(
    subject: Subject, fast: bool, policy: str, dtype: torch.dtype, text: tuple[Tensor, Tensor, Tensor]
) -> Tensor:
    """Return logits [B, T, V] of a prompt with its mask, and of tokens after it, one by one."""
    ids, mask, more = text
    model = subject.adaptive(policy, model=subject.model(dtype), fast=fast)
    cache = model.new_cache()
    with torch.no_grad():
        first = model(ids, mask, past_key_values=cache, logits_to_keep=1).logits
        rest = _feed(model, cache, more)
    if fast and _applies(subject):
        expect(model.slow_because is None, "the fast step to be used", model.slow_because, fast_step.look)
    return torch.cat((first, rest), dim=1)


def _applies(subject: Subject) -> bool:
    """Whether there is a recipe for the config's layers."""
    recipe = subject.adapter.recipe(subject.config)
    layers = subject.adapter.parts(subject.model()).layers
    return recipe is not None and type(layers[0]).__name__ in recipe.layers


def _feed(model: AdaptiveModel, cache: object, tokens: Tensor) -> Tensor:
    """Return logits [B, T, V] of tokens fed one by one."""
    steps = [model(tokens[:, t : t + 1], past_key_values=cache).logits for t in range(tokens.shape[1])]
    return torch.cat([step for step in steps if isinstance(step, Tensor)], dim=1)
