"""Checks that an adapter calls a model as transformers does: with every layer run, it is transformers."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from anee_core.adapter.cache_names import CACHE, LAYER_ARGUMENTS
from anee_core.adapter.layout import find
from anee_core.conformance.check import check, expect, expect_same
from anee_core.conformance.subject import CLOSE, LOOSE, Subject, positions_of

DTYPES = (torch.float32, torch.bfloat16)


@check("paths", look="the paths of Layout", first=True)
def paths(subject: Subject) -> None:
    """Every path of the layout leads to a module of every layer, and every layer stores keys and values."""
    model = subject.model()
    parts = subject.adapter.parts(model)
    layout = parts.layout
    expect(len(parts.layers) == subject.layers, f"{subject.layers} decoder layers", len(parts.layers), "Layout.layers")
    for layer in parts.layers:
        for path in layout.in_layer.values():
            find(layer, path)
    if layout.experts is not None:
        stacked = [n for n, p in parts.layers[-1].named_parameters() if p.dim() > 1]
        inside = any(name.startswith(f"{layout.experts}.") for name in stacked)
        expect(inside, f"stacked weights in '{layout.experts}'", stacked or "none", "Layout.experts")
    expect(
        parts.embedding is model.get_input_embeddings(), "the input embedding", parts.embedding, "ModelAdapter.parts"
    )
    expect(parts.head is model.get_output_embeddings(), "the language-model head", parts.head, "ModelAdapter.parts")
    for layer_idx in range(subject.layers):
        hidden_states, call = subject.adapter.probe(parts, layer_idx)
        keys, _ = subject.adapter.capture_kv(parts, layer_idx, hidden_states, call)
        expect(keys.dim() == 4, "keys [B, H, T, Dh]", list(keys.shape), "Layout.cache_argument")
    subject.adaptive()  # counts the cost of every part


@contextmanager
def recorded(layers: Any) -> Iterator[list[dict[str, Any]]]:
    """Record the arguments of each call of these layers, by name."""
    calls: list[dict[str, Any]] = []

    def note(layer: Any, args: Any, kwargs: Any) -> None:
        bound = inspect.signature(type(layer).forward).bind(layer, *args, **kwargs).arguments
        calls.append({**bound, **bound.pop("kwargs", {})})

    handles = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _calls(subject: Subject, ids: Tensor, mask: Tensor) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Return what transformers and what the engine passes to each layer, eager attention, a padded batch."""
    model = subject.model(attention="eager")
    adaptive = subject.adaptive(model=model)
    with torch.no_grad(), recorded(adaptive.parts.layers) as theirs:
        model(ids, attention_mask=mask, position_ids=positions_of(mask), use_cache=True)
    with torch.no_grad(), recorded(adaptive.parts.layers) as ours:
        adaptive(ids, attention_mask=mask)
    return list(zip(theirs, ours, strict=True))


@check("layer arguments", look="ModelAdapter.embed, begin and layer_arguments")
def layer_arguments(subject: Subject) -> None:
    """Each layer is called with what transformers calls it with: states, positions, rotary angles, a cache."""
    ids, mask = subject.ragged((4, 9), "left")
    real = mask.bool()
    tolerance = CLOSE if subject.routed else None
    for layer_idx, (theirs, ours) in enumerate(_calls(subject, ids, mask)):
        for name, value in theirs.items():
            what, look = f"'{name}' of layer {layer_idx}", _where(name, layer_idx)
            if name in ("self", "attention_mask") or value is None or isinstance(value, (bool, str, dict)):
                continue
            expect(ours.get(name) is not None, f"{what} to be passed", "nothing", look)
            if isinstance(value, Cache):
                expect(hasattr(ours[name], "update"), f"{what} to be a cache", type(ours[name]).__name__, look)
            elif isinstance(value, Tensor):
                _same_for_tokens(ours[name], value, real, what, look, tolerance)
            elif isinstance(value, tuple):
                for mine, other in zip(ours[name], value, strict=True):
                    _same_for_tokens(mine, other, real, what, look, tolerance)


def _where(name: str, layer_idx: int) -> str:
    if name == "hidden_states":
        return "ModelAdapter.embed" if layer_idx == 0 else "ModelAdapter.run"
    return "Layout.cache_argument" if name in LAYER_ARGUMENTS else "ModelAdapter.begin"


def _same_for_tokens(
    found: Any, expected: Tensor, real: Tensor, what: str, look: str, tolerance: tuple[float, float] | None
) -> None:
    """Compare where tokens are real; either side may have a batch of one."""
    expect(isinstance(found, Tensor), f"{what} as a tensor", type(found).__name__, look)
    if expected.dim() < 2 or expected.shape[1] != real.shape[1]:
        expect_same(found, expected, what, look, tolerance)
        return
    shape = (real.shape[0], *expected.shape[1:])
    fits = found.dim() == expected.dim() and found.shape[1:] == expected.shape[1:]
    expect(fits and found.shape[0] in (1, shape[0]), f"{what} of shape {list(shape)}", list(found.shape), look)
    expect_same(found.expand(shape)[real], expected.expand(shape)[real], what, look, tolerance)


@check("window", look="ModelAdapter.window")
def window(subject: Subject) -> None:
    """Each layer sees as many positions back as in transformers."""
    widths = [subject.adapter.window(subject.config, i) for i in range(subject.layers)]
    configured = getattr(subject.config, "sliding_window", None)
    length = min(max(11, max((w for w in (*widths, configured) if w is not None), default=0) + 4), 300)
    length = min(length, subject.adapter.max_positions(subject.config) or length)
    ids, mask = subject.ragged((length - 3, length), "left", extra=0)
    real = mask.bool()
    for layer_idx, (theirs, ours) in enumerate(_calls(subject, ids, mask)):
        expected, found = (_visible(call.get("attention_mask"), length)[real] for call in (theirs, ours))
        differs = (expected != found).any(1)
        if differs.any():
            row = int(differs.nonzero()[0])
            expect(
                False,
                f"layer {layer_idx} to see {int(expected[row].sum())} positions where transformers does",
                f"{int(found[row].sum())} (ModelAdapter.window says {widths[layer_idx]})",
                "ModelAdapter.window",
            )


def _visible(mask: Tensor | None, length: int) -> Tensor:
    """Return who sees whom, [B, T, S] bool, of a bool or additive mask [B, 1, T, S]."""
    if mask is None:
        return torch.ones(2, length, length, dtype=torch.bool)
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return seen.expand(2, -1, -1, -1)[:, 0]


@check("layer output", look="ModelAdapter.run")
def layer_output(subject: Subject) -> None:
    """Running a layer gives the next layer's input."""
    adaptive, ids = subject.adaptive(), subject.tokens()
    with torch.no_grad():
        theirs = subject.model()(ids, output_hidden_states=True).hidden_states
        ours = adaptive(ids, output_hidden_states=True).hidden_states
    for i, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        where = (
            ("ModelAdapter.embed" if i == 0 else "Layout.final_norm") if i in (0, subject.layers) else layer_output.look
        )
        what = f"the input of layer {i}" if i < subject.layers else "the final hidden states"
        expect_same(mine, other, what, where)


@check("dense sequence", look="Layout.final_norm and ModelAdapter.logits")
def dense_sequence(subject: Subject) -> None:
    """Logits of a whole sequence are those of transformers, for every attention backend, in fp32 and bf16."""
    ids = subject.tokens()
    for attention in subject.backends:
        for dtype in DTYPES:
            model = subject.model(dtype, attention)
            with torch.no_grad():
                mine, other = subject.adaptive(model=model)(ids).logits, model(ids).logits
            expect_same(mine, other, f"logits ({attention}, {dtype})", dense_sequence.look)
    model, far = subject.model(), subject.far
    with torch.no_grad():
        mine, other = subject.adaptive()(far).logits, model(far).logits
        expect_same(mine, other, f"logits of {far.shape[1]} tokens", dense_sequence.look, CLOSE)
        offset = torch.arange(far.shape[1] - 8, far.shape[1])[None]
        mine = subject.adaptive()(ids[:1, :8], position_ids=offset).logits
        other = model(ids[:1, :8], position_ids=offset).logits
    expect_same(mine, other, f"logits at positions from {far.shape[1] - 8} on", dense_sequence.look, CLOSE)


@check("dense decode", look="ModelAdapter.begin: positions go on where the cache ends")
def dense_decode(subject: Subject) -> None:
    """Logits of cached decoding are those of transformers, for every attention backend, in fp32 and bf16."""
    ids = subject.tokens(length=14)
    cuts = (0, 6, 7, 8, 12, 14)
    for attention in subject.backends:
        for dtype in DTYPES:
            model = subject.model(dtype, attention)
            ours, mine, theirs = subject.adaptive(model=model), None, None
            for start, end in pairwise(cuts):
                with torch.no_grad():
                    found = ours(ids[:, start:end], past_key_values=mine)
                    wanted = model(ids[:, start:end], **{CACHE: theirs}, use_cache=True)
                mine, theirs = found[CACHE], wanted[CACHE]
                # A mask that is a bool one there, or slots that have left a window there and are masked here, make
                # sums be taken in another order.
                exact = (start == 0 or end == start + 1) and not subject.windowed
                close = CLOSE if dtype == torch.float32 else LOOSE
                what = f"logits of tokens {start} to {end - 1} ({attention}, {dtype})"
                expect_same(found.logits, wanted.logits, what, dense_decode.look, None if exact else close)


@check("padding", look="ModelAdapter.begin: positions differ from row to row")
def padding(subject: Subject) -> None:
    """Logits of a batch padded on the left or on the right are those of transformers."""
    for attention in subject.backends:
        for dtype in DTYPES:
            model = subject.model(dtype, attention)
            for side in ("left", "right"):
                ids, mask = subject.ragged((3, 9, 6), side)
                with torch.no_grad():
                    mine = subject.adaptive(model=model)(ids, attention_mask=mask).logits
                    other = model(ids, attention_mask=mask, position_ids=positions_of(mask)).logits
                what = f"logits, padded on the {side} ({attention}, {dtype})"
                # Experts take the padding along, so that a token's sums may depend on it.
                exact = dtype == torch.float32 and not subject.routed
                real = mask.bool()
                expect_same(
                    mine[real],
                    other[real],
                    what,
                    padding.look,
                    None if exact else CLOSE if dtype == torch.float32 else LOOSE,
                )
