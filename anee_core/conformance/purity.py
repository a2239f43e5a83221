"""Checks that an adapter changes nothing that it is given, and lets gradients through."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from anee_core.adapter.layout import find
from anee_core.conformance.check import check, expect, expect_same
from anee_core.conformance.subject import CLOSE, Subject


@check("attention input", look="Layout.input_norm, or ModelAdapter.attention_input")
def attention_input(subject: Subject) -> None:
    """Token policies see what each layer's attention is given."""
    model, ids = subject.model(), subject.tokens()
    parts = subject.adapter.parts(model)
    given: dict[int, Tensor] = {}

    def note(layer_idx: int) -> Callable[..., None]:
        def hook(module: Any, args: Any, kwargs: Any) -> None:
            given[layer_idx] = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]

        return hook

    handles = [
        find(layer, parts.layout.attention).register_forward_pre_hook(note(i), with_kwargs=True)
        for i, layer in enumerate(parts.layers)
    ]
    try:
        with torch.no_grad():
            states = model(ids, output_hidden_states=True).hidden_states
    finally:
        for handle in handles:
            handle.remove()
    if parts.layout.input_norm is None:
        return  # then it is what the layer itself is given
    for i in range(len(parts.layers)):
        with torch.no_grad():
            mine = subject.adapter.attention_input(parts, i, states[i])
        expect_same(mine, given[i], f"what attention of layer {i} is given", attention_input.look, CLOSE)


@check("inputs", look="ModelAdapter.embed, begin, run, project_kv and logits: none may work in place")
def inputs(subject: Subject) -> None:
    """Nothing that is handed to the adapter is changed."""
    adapter, parts = subject.adapter, subject.adapter.parts(subject.model())
    generator = torch.Generator().manual_seed(3)
    states = torch.randn(2, 7, parts.embedding.weight.shape[-1], generator=generator)
    positions = torch.arange(7).repeat(2, 1)
    with torch.no_grad():
        first = _unchanged("embed", partial(adapter.embed, parts, states, positions), states, positions)
        calls = _unchanged("begin", partial(adapter.begin, parts, first, positions), first, positions)
        causal = torch.full((7, 7), torch.finfo(torch.float32).min).triu(1).expand(2, 1, -1, -1)
        for i, call in enumerate(calls):
            given = (first, call.position_ids, *(call.position_embeddings or ()))
            masked = call.with_mask(causal)
            _unchanged("project_kv", partial(adapter.project_kv, parts, i, first, masked), *given)
            _unchanged("attention_input", partial(adapter.attention_input, parts, i, first), first)
            _unchanged("run", partial(adapter.run, parts, i, first, masked, _Kept()), *given)
        final = parts.final_norm(first)
        _unchanged("logits", partial(adapter.logits, parts, final), final)


class _Kept:
    """A cache that hands back what it is given."""

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return keys, values


def _unchanged(name: str, act: Callable[[], Any], *given: Tensor) -> Any:
    """Return what a method of the adapter gives, and raise `MismatchError` if it changed its arguments."""
    before = [tensor.clone() for tensor in given]
    found = act()
    same = all(torch.equal(old, new) for old, new in zip(before, given, strict=True))
    expect(same, "the adapter's arguments as they were", "others", f"ModelAdapter.{name}, which works in place")
    return found


@check("gradients", look="ModelAdapter.run, embed and logits: none may leave autograd")
def gradients(subject: Subject) -> None:
    """Every weight gets the gradient that it gets in transformers, and under skipping that of the layers that run."""
    ids, found = subject.tokens(), []
    for own in (False, True):
        model = subject.build()
        called = subject.adaptive(model=model) if own else model
        logits = called(ids, use_cache=False).logits
        weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(4))
        (logits * weights).sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    theirs, ours = found
    expect(ours.keys() == theirs.keys(), f"gradients of {len(theirs)} weights", len(ours), gradients.look)
    for name, gradient in theirs.items():
        scale = float(gradient.abs().max()) or 1.0
        expect_same(ours[name] / scale, gradient / scale, f"the gradient of '{name}'", gradients.look, (1e-4, 1e-3))
