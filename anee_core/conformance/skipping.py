"""Checks of skipping and leaving early: keys and values, order of tokens, rows of a batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from anee_core.accounting.work import leaves
from anee_core.adapter.cache_names import CACHE
from anee_core.conformance.check import check, expect, expect_same
from anee_core.conformance.subject import CLOSE, LOOSE, Subject, stepwise, without_layers
from anee_core.model.adaptive_model import AdaptiveModel

POLICIES = (
    "static:skip=1 3",
    "static:skip=0",
    "random:p=0.5,protect=0 0+shortcuts",
    "random:p=0.3,exit=0.2,protect=0 0",
    "window:sinks=1,recent=4",
    "random:p=0.5,protect=0 0+window:sinks=1,recent=4",
)


def _causal(length: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the additive mask of two rows of a sequence, [2, 1, T, T]."""
    return torch.full((length, length), torch.finfo(dtype).min, dtype=dtype).triu(1).expand(2, 1, -1, -1)


@check(
    "keys and values",
    look="Layout.input_norm, key, value, fused, key_norm, or ModelAdapter.head_dim, kv_width and project_kv",
)
def keys_and_values(subject: Subject) -> None:
    """A skipped layer gets the keys and values that transformers' own cache holds for the same hidden states."""
    ids = subject.tokens(length=subject.far.shape[1])
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    for dtype, tolerance in ((torch.float32, CLOSE), (torch.bfloat16, LOOSE)):
        model = subject.model(dtype)
        adaptive = subject.adaptive(model=model)
        # A cache without windows: transformers drops what has left one, which is not the question here.
        theirs = DynamicCache()
        with torch.no_grad():
            states = model(ids, **{CACHE: theirs}, use_cache=True, output_hidden_states=True).hidden_states
            ours = adaptive(ids)[CACHE]
            calls = subject.adapter.begin(adaptive.parts, states[0], positions)
            for i in range(subject.layers):
                wanted = theirs.layers[i].keys, theirs.layers[i].values
                call = calls[i].with_mask(_causal(ids.shape[1], dtype))
                skipped = subject.adapter.project_kv(adaptive.parts, i, states[i], call)
                for name, ran, given, other in zip(
                    ("keys", "values"), ours.keys_values(i), skipped, wanted, strict=True
                ):
                    expect_same(ran, other, f"stored {name} of layer {i}, run", "Layout.cache_argument")
                    what = f"{name} of layer {i}, skipped ({dtype})"
                    expect_same(given, other, what, keys_and_values.look, tolerance)
    _follow_hooks(subject, positions)


def _follow_hooks(subject: Subject, positions: Tensor) -> None:
    """Raise unless modules are called where someone has hooked them: LoRA, quantisation and offloading depend on it."""
    adaptive = subject.adaptive(model=subject.build())
    adapter, parts = subject.adapter, adaptive.parts
    states = torch.randn(2, positions.shape[1], parts.config.hidden_size, generator=torch.Generator().manual_seed(2))
    call = adapter.begin(parts, states, positions)[0].with_mask(_causal(positions.shape[1]))
    for leaf in leaves(parts.layers[0]):
        leaf.register_forward_hook(lambda module, args, output: output * 1.5 if isinstance(output, Tensor) else output)
    with torch.no_grad():
        wanted = adapter.capture_kv(parts, 0, states, call)
        found = adapter.project_kv(parts, 0, states, call)
    for name, mine, other in zip(("keys", "values"), found, wanted, strict=True):
        what, look = f"{name} from hooked modules", "ModelAdapter.project_kv: it calls modules, never their weights"
        expect_same(mine, other, what, look, CLOSE)


@check("skip", look="ModelAdapter.project_kv and run: neither may rely on the layer before")
def skip(subject: Subject) -> None:
    """Skipping layers for all tokens is the transformers model without them, in a sequence and in generation.

    With shortcuts, their estimates come in the layers' place.
    """
    model, ids = subject.model(), subject.tokens()
    every = subject.layers
    path = subject.adapter.parts(model).layout.layers
    for removed in ({2 % every}, {0, every - 1}, {1 % every, 2 % every}):
        if len(removed) == every:
            continue
        theirs = without_layers(model, path, removed)
        ours = subject.adaptive("static:skip=" + " ".join(map(str, sorted(removed))))
        what = f"without layers {sorted(removed)}"
        with torch.no_grad():
            expect_same(ours(ids).logits, theirs(ids).logits, f"logits {what}", skip.look)
            options = {"attention_mask": torch.ones_like(ids), "pad_token_id": 0, "do_sample": False}
            wanted = theirs.generate(ids, max_new_tokens=8, **options)
        expect_same(ours.generate(ids, max_new_tokens=8, **options), wanted, f"generated ids {what}", skip.look)
    half = subject.model(torch.bfloat16)
    theirs, ours = without_layers(half, path, {1}), subject.adaptive("static:skip=1", model=half)
    with torch.no_grad():
        expect_same(ours(ids).logits, theirs(ids).logits, "logits without layer 1 in bf16", skip.look)
    _expect_shortcut(subject)


def _expect_shortcut(subject: Subject) -> None:
    """Raise unless a skipped layer adds its shortcut's estimate, and stores what it would without one."""
    ids, weights = subject.tokens(), subject.shortcuts
    layer_idx = subject.layers // 2
    with torch.no_grad():
        plain, adding = (
            subject.adaptive(f"static:skip={layer_idx}{end}")(ids, output_hidden_states=True)
            for end in ("", "+shortcuts")
        )
        before, after = adding.hidden_states[layer_idx : layer_idx + 2]
        unit = before / before.square().mean(-1, keepdim=True).sqrt()
        estimate = unit @ weights.down[layer_idx].T @ weights.up[layer_idx].T + weights.bias[layer_idx]
    expect_same(after, before + estimate, f"hidden states behind the shortcut of layer {layer_idx}", skip.look, CLOSE)
    both = zip(
        ("keys", "values"), adding[CACHE].keys_values(layer_idx), plain[CACHE].keys_values(layer_idx), strict=True
    )
    for name, mine, other in both:
        expect_same(mine, other, f"{name} of layer {layer_idx}, with a shortcut", skip.look, CLOSE)


@check("exit", look="ModelAdapter.project_kv: one key and value for each token")
def leave(subject: Subject) -> None:
    """After leaving at any layer every layer's cache is aligned, and the next token runs as if all had been skipped."""
    adapter, ids = subject.adapter, subject.tokens()
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    for layer_idx in range(1, subject.layers):
        leaving = subject.adaptive(f"static:exit={layer_idx}")
        rest = " ".join(map(str, range(layer_idx, subject.layers)))
        skipping = subject.adaptive(f"static:skip={rest}")
        with torch.no_grad():
            output = leaving(ids, output_hidden_states=True)
            caches = [output[CACHE], skipping(ids)[CACHE]]
            for i in range(layer_idx, subject.layers):
                states = output.hidden_states[i]
                call = adapter.begin(leaving.parts, states, positions)[i].with_mask(_causal(ids.shape[1]))
                wanted = adapter.capture_kv(leaving.parts, i, states, call)
                for mine, other in zip(caches[0].keys_values(i), wanted, strict=True):
                    what = f"cache of layer {i} after leaving at {layer_idx}"
                    expect_same(mine, other, what, leave.look, CLOSE)
            dense = subject.adaptive()
            token = subject.tokens(length=1, seed=7)
            logits = [dense(token, past_key_values=cache).logits for cache in caches]
            expect_same(logits[0], logits[1], f"next logits after leaving at layer {layer_idx}", leave.look)
            for t in range(3):  # a cache whose layers came out of step would fail here
                last = logits[0].argmax(-1)[:, -1:]
                found = leaving(last, past_key_values=caches[0])
                expect(found[CACHE].get_seq_length() == ids.shape[1] + 2 + t, "one more token", "not", leave.look)


@check("parallel equals stepwise", look="ModelAdapter.begin and project_kv: a token may depend on nothing after it")
def parallel(subject: Subject) -> None:
    """A whole sequence in one forward gives the logits of decoding it token by token, for every kind of policy."""
    ids = subject.tokens()
    for policy in ("dense", *POLICIES):
        model = subject.adaptive(policy)
        with torch.no_grad():
            whole, steps = model(ids).logits, stepwise(model, ids)
        expect_same(whole, steps, f"logits under '{policy}'", parallel.look, CLOSE)
    far, model = subject.far, subject.adaptive(POLICIES[-1])
    with torch.no_grad():
        whole, steps = model(far).logits, stepwise(model, far)
    expect_same(whole, steps, f"logits of {far.shape[1]} tokens under '{POLICIES[-1]}'", parallel.look, CLOSE)


@check("rows", look="ModelAdapter.begin, embed and project_kv: a row may depend on no other")
def rows(subject: Subject) -> None:
    """Each row of a ragged batch, padded on either side, gets what it gets alone."""
    for policy in ("dense", *POLICIES[-4:]):
        expect_rows_alone(subject, subject.adaptive(policy), f"under '{policy}'", rows.look)


def expect_rows_alone(subject: Subject, model: AdaptiveModel, what: str, look: str) -> None:
    """Raise `MismatchError` unless the rows of a ragged batch get what they get alone."""
    for side in ("left", "right"):
        ids, mask = subject.ragged((4, 9, 1), side)
        with torch.no_grad():
            batched = model(ids, attention_mask=mask).logits
            for row in range(3):
                real = mask[row].bool()
                alone = model(ids[row, real][None]).logits[0]
                expect_same(
                    batched[row, real], alone, f"logits of row {row}, padded on the {side}, {what}", look, CLOSE
                )


@check("causal effect", look="Layout.cache_argument and ModelAdapter.run: attention reads the cache it is given")
def causal_effect(subject: Subject) -> None:
    """Disturbing what a layer stored, run or skipped, changes what a later token gets."""
    every = subject.layers
    skipping, dense = subject.adaptive(f"static:skip={every // 2}"), subject.adaptive()
    ids, token = subject.tokens(length=4), subject.tokens(length=1, seed=9)

    def next_logits(layer_idx: int | None, part: int) -> Any:
        with torch.no_grad():
            cache = skipping(ids)[CACHE]
            if layer_idx is not None:
                held = cache.keys_values(layer_idx)[part]
                held.add_(torch.randn(held.shape, generator=torch.Generator().manual_seed(1)))
            return dense(token, past_key_values=cache).logits

    clean = next_logits(None, 0)
    for layer_idx in range(every):
        for part, name in enumerate(("keys", "values")):
            change = (next_logits(layer_idx, part) - clean).abs().max().item()
            expect(
                change > 1e-4,
                f"other logits after disturbing the {name} of layer {layer_idx}",
                change,
                causal_effect.look,
            )
