"""Caches filled with random keys and values, and all that can be seen of them."""

import itertools

import torch
from torch.nn.functional import scaled_dot_product_attention

from anee_core.cache.masks import additive, visible

LAYERS, HEADS, WIDTH = 3, 2, 4
CLOSE = {"atol": 1e-5, "rtol": 1e-4}


def some(*shape, seed=0, dtype=torch.float32):
    """Return random numbers that depend on nothing but the arguments."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def attend(cache, layer, query, position, window=None, held=None, rows=None):
    """Return attention [R, H, T, Dh] of queries at positions [R, T] over a layer's slots, through the cache's mask."""
    slots = cache.slots[layer]
    rows = torch.arange(cache.batch) if rows is None else rows
    everywhere = position.new_zeros(cache.batch, position.shape[1])
    everywhere[rows] = position
    mask = additive(visible(slots, everywhere, window)[rows], query.dtype)
    return scaled_dot_product_attention(query, *(held or cache.keys_values(layer)), attn_mask=mask)


def open_block(cache, count, batch=2, real=None, dtype=torch.float32, seed=0):
    """Begin a forward over ``count`` tokens and write every layer; return each layer's keys and values."""
    cache.begin(torch.arange(cache.seen, cache.seen + count).expand(batch, -1), real)
    written = []
    for layer in range(len(cache.layers)):
        seeds = (100 * seed + 2 * layer, 100 * seed + 2 * layer + 1)
        keys, values = (some(batch, HEADS, count, WIDTH, seed=s, dtype=dtype) for s in seeds)
        cache.write(layer, keys, values)
        written.append((keys, values))
    return written


def feed(cache, count, **options):
    """Run a whole forward over ``count`` tokens."""
    written = open_block(cache, count, **options)
    cache.commit()
    return written


def evict_but_last(cache, count):
    """Drop all but the last ``count`` slots of every layer."""
    for layer, slots in enumerate(cache.slots):
        cache.evict(layer, (torch.arange(slots.used) >= slots.used - count).expand(cache.batch, 1, -1))


def snapshot(cache):
    """Return the logical length, and for each layer and row the positions, keys and values of the tokens held."""
    rows = []
    for layer, row in itertools.product(range(len(cache.slots)), range(cache.batch)):
        valid = cache.slots[layer].valid()[row]
        keys, values = cache.keys_values(layer)
        rows.append((cache.slots[layer].positions()[row, valid], keys[row][:, valid], values[row][:, valid]))
    return cache.get_seq_length(), [tuple(t.clone() for t in row) for row in rows]


def assert_same(before, after):
    assert before[0] == after[0]
    assert len(before[1]) == len(after[1])
    for old, new in zip(before[1], after[1], strict=True):
        assert all(torch.equal(left, right) for left, right in zip(old, new, strict=True))
