"""Token policies against slow twins made of Python lists, and the attention that they see against transformers' own."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from tiny import FEW, adaptive, build, tokens

from anee_core.cache_policies.h2o import H2OCachePolicy
from anee_core.cache_policies.knorm import KeyNormCachePolicy
from anee_core.cache_policies.random_tokens import RandomTokensCachePolicy
from anee_core.cache_policies.snapkv import SnapKVCachePolicy
from anee_core.cache_policies.tova import TovaCachePolicy
from anee_core.cache_policies.window import WindowCachePolicy
from anee_core.errors import ModelError, PolicyError
from anee_core.interfaces import CachePolicy, CacheView

HEADS, TOKENS = 3, 23


def view_of(policy, keys, attention, ran=None, layer_idx=0):
    """Return what a policy sees of one row whose every token is new."""
    positions = torch.arange(TOKENS)[None]
    later = torch.arange(TOKENS) > torch.arange(TOKENS)[:, None]
    real = torch.ones(1, TOKENS, dtype=torch.bool)
    view = CacheView(
        layer_idx=layer_idx,
        position_ids=positions,
        valid=real,
        query_position=positions,
        ran=real if ran is None else ran[None],
        real=real,
        state={},
        keys=keys[None] if "keys" in policy.wants else None,
        attention=attention[None].masked_fill(later, -torch.inf) if "attention" in policy.wants else None,
    )
    return replace(view, state=policy.remember(view))


def best(scores, held, count, first):
    """Return the ``count`` held tokens that come first, then have the highest scores, then are the oldest."""
    return sorted(sorted(held, key=lambda j: (first(j), scores[j]), reverse=True)[:count])


def twin(kind, keys, attention, allowed, ran=None, sinks=0, recent=1, every=4, window=2, pool=3):
    """Return the tokens held after each token, as lists, by the definition of a policy."""
    scores, held, history = [0.0] * TOKENS, [], []
    for i in range(TOKENS):
        held.append(i)
        count = allowed(i + 1)
        runs = ran is None or bool(ran[i])
        shares = torch.stack([attention[h, i, held].softmax(0) for h in range(HEADS)]).mean(0).tolist()
        newest = recent
        if kind == "h2o":
            newest = recent or count // 2
            for j, share in zip(held, shares, strict=True):
                scores[j] += share if runs else 0.0
        elif kind == "tova" and runs:
            for j, share in zip(held, shares, strict=True):
                scores[j] = share
        elif kind == "knorm":
            scores[i] = -float(keys[:, i].norm(dim=-1).mean().half())
        elif kind == "snapkv":
            newest = max(window, recent)
            place = i % every - (every - window)
            if place == 0:
                scores = [0.0] * TOKENS
            if place >= 0 and runs:
                for j, share in zip(held, shares, strict=True):
                    scores[j] += share
        ranked = list(scores)
        if kind == "snapkv":
            for n, j in enumerate(held):
                near = held[max(0, n - pool // 2) : n + pool // 2 + 1]
                ranked[j] = sum(scores[k] for k in near) / len(near)

        def first(j, i=i, newest=newest):
            if j == i:
                return 3, 0
            return (2, -j) if j < sinks else (1, j) if j > i - newest else (0, 0)

        if kind != "snapkv" or (i + 1) % every == 0:
            held = best(ranked, held, count, first)
        history.append(list(held))
    return history


def share(keep):
    return lambda seen: max(1, math.ceil(keep * seen - 0.01))


CASES = [
    ("h2o", H2OCachePolicy(keep=0.4, least=1), {"allowed": share(0.4), "recent": 0}),
    ("h2o", H2OCachePolicy(keep=6, recent=2, sinks=1), {"allowed": lambda n: 6, "recent": 2, "sinks": 1}),
    ("tova", TovaCachePolicy(keep=0.3, least=1), {"allowed": share(0.3)}),
    ("tova", TovaCachePolicy(keep=5, sinks=2, recent=2), {"allowed": lambda n: 5, "sinks": 2, "recent": 2}),
    ("tova", TovaCachePolicy(keep=2, sinks=4, recent=4), {"allowed": lambda n: 2, "sinks": 4, "recent": 4}),
    ("knorm", KeyNormCachePolicy(keep=0.5, least=1, recent=3), {"allowed": share(0.5), "recent": 3}),
    (
        "snapkv",
        SnapKVCachePolicy(keep=0.4, least=1, every=5, window=2, pool=3, sinks=1),
        {"allowed": share(0.4), "sinks": 1, "every": 5, "window": 2, "pool": 3},
    ),
    (
        "snapkv",
        SnapKVCachePolicy(keep=4, every=3, window=3, pool=5),
        {"allowed": lambda n: 4, "every": 3, "window": 3, "pool": 5},
    ),
]


@pytest.mark.parametrize("skipping", [False, True])
@pytest.mark.parametrize(("kind", "policy", "options"), CASES, ids=[f"{c[0]}-{i}" for i, c in enumerate(CASES)])
def test_policy_keeps_what_its_definition_says(kind, policy, options, skipping):
    generator = torch.Generator().manual_seed(len(kind))
    keys = torch.randn(HEADS, TOKENS, 8, generator=generator)
    attention = 2 * torch.randn(HEADS, TOKENS, TOKENS, generator=generator)
    ran = torch.rand(TOKENS, generator=generator) < 0.5 if skipping else None
    keep, changed = policy.decide(view_of(policy, keys, attention, ran))
    found = [[j for j in range(i + 1) if keep[0, i, j]] for i in range(TOKENS)]
    assert found == twin(kind, keys, attention, ran=ran, **options)
    assert bool(changed) == policy.rewrites


def test_window_by_share_keeps_sinks_and_the_newest():
    policy = WindowCachePolicy(keep=0.4, least=1, sinks=2)
    positions = torch.arange(TOKENS)[None]
    keep = policy.retain(view_of(policy, None, None))[0]
    for i in range(TOKENS):
        allowed = share(0.4)(i + 1)
        wanted = {i, *range(min(2, allowed - 1)), *range(i + 1 - max(allowed - 2, 1), i + 1)}
        assert {j for j in range(i + 1) if keep[i, j]} == {j for j in wanted if 0 <= j <= i}
    assert positions.shape == (1, TOKENS)


@pytest.mark.parametrize("policy", ["window:sinks=4,keep=0.1", "h2o:keep=0.1", "tova:keep=0.1", "knorm:keep=0.1"])
def test_a_share_drops_nothing_before_there_are_a_few_tokens(policy):
    model = adaptive(build("llama"), policy)
    model(tokens(2, 24))
    held = model.last_trace.held
    assert torch.equal(held, (torch.arange(24) + 1).clamp(max=16).expand_as(held))


def test_random_tokens_are_another_draw_in_each_layer_and_for_each_seed():
    kept = set()
    for layer_idx, seed in ((0, 0), (1, 0), (0, 1)):
        policy = RandomTokensCachePolicy(keep=0.4, least=1, seed=seed)
        keep, _ = policy.decide(view_of(policy, None, None, layer_idx=layer_idx))
        assert keep[0, -1].sum() == share(0.4)(TOKENS)
        kept.add(tuple(keep[0, -1].tolist()))
    assert len(kept) == 3


@dataclass(frozen=True)
class Spy(CachePolicy):
    """Keeps everything and notes what attention it was shown."""

    name = "spy"
    wants = frozenset({"attention"})
    seen = {}

    def retain(self, view):
        self.seen.setdefault(view.layer_idx, []).append(view.attention.softmax(-1))
        return torch.ones(1, 1, 1, dtype=torch.bool)


@pytest.mark.parametrize(
    ("family", "backend"),
    [(f, b) for f in (*FEW, "gemma3", "gptj", "opt") for b in ("sdpa", "eager") if (f, b) != ("gptj", "sdpa")],
)
def test_attention_shown_to_a_policy_is_the_models_own(family, backend):
    ids = tokens()
    oracle = build(family, "eager")
    with torch.no_grad():
        wanted = oracle(ids, output_attentions=True).attentions
        for at_once in (True, False):
            Spy.seen.clear()
            model, cache = adaptive(build(family, backend), Spy()), None
            for block in [ids] if at_once else ids.split(1, dim=1):
                cache = model(block, past_key_values=cache).past_key_values
            for layer_idx, parts in Spy.seen.items():
                for t, row in enumerate(parts if not at_once else parts[0].unbind(2)):
                    shown = row if at_once else row[:, :, 0]
                    width = shown.shape[-1]
                    torch.testing.assert_close(shown, wanted[layer_idx][:, :, t, :width], atol=2e-5, rtol=1e-3)


def test_a_family_whose_attention_cannot_be_seen_is_refused(monkeypatch):
    model = adaptive(build("llama"), "tova:keep=0.5,least=1")
    attend = model.model.model.layers[0].self_attn
    monkeypatch.setattr(type(attend), "forward", lambda self, hidden_states, **kwargs: (hidden_states, None))
    with pytest.raises(ModelError, match="cannot see them in this family"):
        model(tokens())


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("tova:keep=0", "keep is a share in"),
        ("tova:least=0", "tova: least is a whole number, at least 1 and at most 2,147,483,647; got 0"),
        ("tova:keep=1.5", "whole number of tokens"),
        ("tova:keep=-3", "keep is a share in"),
        ("tova:keep=nan", "finite"),
        ("h2o:keep=0.5,recent=-1", "h2o: recent is a whole number, at least 0"),
        ("snapkv:every=4,window=5", "window <= every"),
        ("snapkv:pool=2", "odd pool"),
        ("window:sinks=-1", "window: sinks is a whole number, at least 0"),
        ("asa", "no weights are installed"),
        ("asa:no/such/folder", "is missing"),
        ("knorm:keep=0.1 0.2", "one for each of 6 layers"),
    ],
)
def test_wrong_options_say_what_is_wrong(policy, message):
    with pytest.raises((PolicyError, Exception), match=message) as caught:
        adaptive(build("llama"), policy)
    assert type(caught.value).__module__ == "anee_core.errors"
