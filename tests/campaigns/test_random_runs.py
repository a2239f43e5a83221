"""Any family under any policy, padded and cut in any way: a block is its tokens one by one, and a batch its rows."""

import itertools
import random

import torch
from tiny import FAMILIES, POLICIES, adaptive, gate_weights, shared, tokens

LAYER_POLICIES = (
    "dense", "static:skip=1 3", "static:skip=0 5", "static:exit=4", "random:p=0.5,protect=0 0",
    "random:p=0.3,exit=0.2,protect=1 1", "heuristic:protect=1 1", "heuristic:protect=1 1,exit=0.3,spread=0.2",
    "gate:{},protect=1 1", "gate:{},protect=0 1,first=1,window=5+shortcuts:{}", "random:p=0.5,protect=1 1+shortcuts:{}",
)  # fmt: skip
TOKEN_POLICIES = (
    "", "", "window:sinks=1,recent=4", "window:sinks=1,keep=0.4,least=1", "h2o:keep=0.4,least=1", "tova:keep=5",
    "tova:keep=0.3 0.5 3 4 0.5 1,least=1,sinks=1,recent=2", "knorm:keep=0.4,least=1,recent=2",
    "snapkv:keep=0.4,least=1,every=4,window=2,pool=3", "random_tokens:keep=0.4,least=1",
)  # fmt: skip
PADDINGS = ("none", "left", "right")


def padded(lengths, side, extra, seed):
    """Return ids and mask [B, T] of rows with these lengths."""
    width = max(lengths) + extra
    ids, mask = torch.zeros(len(lengths), width, dtype=torch.long), torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        at = slice(0, length) if side == "right" else slice(width - length, width)
        ids[row, at], mask[row, at] = tokens(1, length, seed=seed * 10 + row)[0], 1
    return ids, mask


def in_pieces(model, ids, mask, length):
    """Return logits [B, T, V] of a block that is read in pieces through a cache; every row begins in the first."""
    begun = int(mask.argmax(1).max()) + 1
    edges = [0, *range(begun, ids.shape[1], length), ids.shape[1]]
    cache, parts = model.new_cache(), []
    for start, end in itertools.pairwise(edges):
        parts.append(model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache).logits)
    return torch.cat(parts, dim=1)


def run(draw, folder, seed):
    """Return what was drawn, and how far apart logits are that should be equal."""
    family, layers, drops = draw.choice(FAMILIES), draw.choice(LAYER_POLICIES), draw.choice(TOKEN_POLICIES)
    policy = "+".join(part for part in (layers.format(folder, folder), drops) if part)
    budget = draw.choice((0.7, 0.8, 0.9)) if layers.startswith(("heuristic", "gate")) else None
    rows, side = draw.randint(1, 4), draw.choice(PADDINGS)
    longest = draw.randint(1, 24)
    lengths = [longest] * rows if side == "none" else [draw.randint(1, longest) for _ in range(rows)]
    extra = 0 if side == "none" else draw.randint(0, 3)
    chunk, hard, fast = draw.randint(1, 12), draw.random() < 0.3 and budget is not None, draw.random() < 0.5
    model = adaptive(shared(family), policy, budget, hard=hard, fast=fast, prefill_chunk=draw.choice((3, 256)))
    ids, mask = padded(lengths, side, extra, seed)
    whole = model(ids, attention_mask=mask).logits
    # A piece that is all padding ends a row, so rows padded on the right go on one by one only alone.
    others = {} if side == "right" else {f"in pieces of {n}": in_pieces(model, ids, mask, n) for n in (1, chunk)}
    alone, stepwise = torch.zeros_like(whole), torch.zeros_like(whole)
    for row in range(rows):
        own = ids[row, mask[row].bool()][None]
        alone[row, mask[row].bool()] = model(own).logits[0]
        stepwise[row, mask[row].bool()] = in_pieces(model, own, torch.ones_like(own), 1)[0]
    others |= {"rows alone": alone, "rows alone, one by one": stepwise}
    real = mask.bool()
    drawn = f"{family} under {policy} at {budget}, hard={hard}, fast={fast}, rows of {lengths}, padded {side} + {extra}"
    return {f"{drawn}: {how}": float((whole - other)[real].abs().max()) for how, other in others.items()}


@torch.no_grad()
def test_blocks_equal_their_tokens_and_batches_their_rows(campaign, tmp_path):
    for weights in gate_weights():
        weights.save(tmp_path)
    for seed in campaign.trials("random runs", short=6, long=3_000):
        for what, distance in run(random.Random(seed), tmp_path, seed).items():
            if not distance < 1e-3:
                campaign.fault(f"seed {seed}, {what}: {distance:.2g}")


def test_the_policies_of_all_tests_are_among_those_drawn():
    names = {part.partition(":")[0] for given, _ in POLICIES.values() for part in given.split("+")}
    drawn = {part.partition(":")[0] for given in LAYER_POLICIES + TOKEN_POLICIES for part in given.split("+")}
    assert names <= drawn
