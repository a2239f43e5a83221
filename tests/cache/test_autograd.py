"""Training and inference mode: no graph outlives its forward, and a cache goes on in the other mode."""

import gc
import weakref

import pytest
import torch
from filled_cache import HEADS, LAYERS, WIDTH, feed, some
from torch.nn.functional import scaled_dot_product_attention

from anee_core.cache import AdaptiveCache
from anee_core.cache.writer import CacheWriter


@pytest.mark.parametrize("trained", ["keys", "values", "both"])
@pytest.mark.parametrize("end", ["commit", "abort"])
def test_no_graph_outlives_its_forward(trained, end):
    cache = AdaptiveCache(1)
    feed(cache, 3)
    leaf = some(2, HEADS, 1, WIDTH).requires_grad_()
    keys = leaf.detach() if trained == "values" else leaf * 2
    values = leaf.detach() if trained == "keys" else leaf.exp()
    graph = weakref.ref(values if trained != "keys" else keys)
    cache.begin(torch.full((2, 1), 3), None)
    held = CacheWriter(cache, 0).update(keys, values, 0)
    scaled_dot_product_attention(some(2, HEADS, 1, WIDTH), *held).sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.abs().sum() > 0
    getattr(cache, end)()
    assert not cache.layers[0].keys.requires_grad
    assert not cache.layers[0].values.requires_grad
    del keys, values, held
    gc.collect()
    assert graph() is None


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("change", ["nothing", "growth", "a drop", "compaction", "a reordering"])
def test_a_cache_filled_in_inference_mode_goes_on_outside(change, trained):
    cache = AdaptiveCache(LAYERS, capacity=45 if change == "growth" else 100)
    with torch.inference_mode():
        feed(cache, 40)
        cache.keeps_dropped = change == "a drop"
        if change in ("a drop", "compaction"):
            cache.evict(1, torch.arange(40).expand(2, 1, -1) > 25)
        cache.commit()
        if change == "a reordering":
            cache.reorder(torch.tensor([1, 0]))
        feed(cache, 10, seed=1)
    cache.rollback(1)
    cache.evict(1, torch.arange(cache.slots[1].used).expand(2, 1, -1) > 5)
    cache.begin(torch.full((2, 1), 49), None)
    for layer in range(LAYERS):
        cache.write(layer, *(some(2, HEADS, 1, WIDTH).requires_grad_(trained) for _ in range(2)))
    cache.commit()
    assert cache.get_seq_length() == 50
