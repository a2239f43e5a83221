"""A forward that fails, runs out of memory or is refused leaves no trace in the cache."""

import itertools

import pytest
import torch
from filled_cache import (
    CLOSE,
    HEADS,
    LAYERS,
    WIDTH,
    assert_same,
    attend,
    evict_but_last,
    feed,
    open_block,
    snapshot,
    some,
)

import anee
from anee_core.cache import AdaptiveCache
from anee_core.cache.layer_store import LayerStore
from anee_core.errors import CacheError


def test_another_batch_size_is_refused_and_changes_nothing():
    cache = AdaptiveCache(LAYERS)
    feed(cache, 4)
    before = snapshot(cache)
    with pytest.raises(CacheError, match="holds 2 rows and got 3: start a new cache, or reorder"):
        cache.begin(torch.zeros(3, 1, dtype=torch.long), None)
    assert_same(before, snapshot(cache))
    feed(cache, 1)
    assert cache.get_seq_length() == 5


@pytest.mark.parametrize("reached", [0, 1, LAYERS])
@pytest.mark.parametrize("recording", [False, True])
def test_a_failed_forward_leaves_no_trace(reached, recording):
    cache, undisturbed = AdaptiveCache(LAYERS), AdaptiveCache(LAYERS)
    real = torch.tensor([[False] * 3 + [True] * 17, [True] * 20])
    for each in (cache, undisturbed):
        each.keeps_dropped = recording
        feed(each, 20, real=real)
        open_block(each, 1, seed=1)
        evict_but_last(each, 8)
        each.commit()
    # Far more tokens than there is room for, and drops in the layers that were reached.
    cache.begin(torch.arange(21, 321).expand(2, -1), torch.rand(2, 300) < 0.5)
    for layer in range(reached):
        cache.write(layer, *(some(2, HEADS, 300, WIDTH, seed=9) for _ in range(2)))
        cache.evict(layer, torch.rand(2, 1, cache.slots[layer].used) < 0.5)
    cache.abort()
    assert_same(snapshot(undisturbed), snapshot(cache))
    for each in (cache, undisturbed):
        feed(each, 2, seed=3)
    assert_same(snapshot(undisturbed), snapshot(cache))
    query = some(2, HEADS, 2, WIDTH)
    position = torch.tensor([[21, 22], [21, 22]])
    for layer in range(LAYERS):
        wanted = attend(undisturbed, layer, query, position, 9)
        torch.testing.assert_close(attend(cache, layer, query, position, 9), wanted, **CLOSE)


@pytest.mark.parametrize("fails_at", range(2 * LAYERS))
def test_running_out_of_memory_while_growing_leaves_no_trace(fails_at, monkeypatch):
    cache = AdaptiveCache(LAYERS)
    feed(cache, 5)
    before = snapshot(cache)
    allocate, calls = LayerStore._allocate, itertools.count()

    def scarce(self, like, capacity):
        if next(calls) == fails_at:
            raise torch.OutOfMemoryError
        return allocate(self, like, capacity)

    monkeypatch.setattr(LayerStore, "_allocate", scarce)
    with pytest.raises(torch.OutOfMemoryError):
        open_block(cache, 2)
    assert_same(before, snapshot(cache))
    feed(cache, 1, seed=1)
    assert cache.kept().tolist() == [[6, 6]] * LAYERS
    cache.rollback(1)
    assert_same(before, snapshot(cache))


@pytest.mark.parametrize("alike", [True, False])
def test_running_out_of_memory_while_compacting_leaves_an_empty_cache(alike, monkeypatch):
    cache = AdaptiveCache(LAYERS)
    feed(cache, 60)
    open_block(cache, 1)
    keep = torch.zeros(cache.batch, 1, 61, dtype=torch.bool)
    for layer_idx in [None] if alike else range(LAYERS):
        cache.evict(layer_idx, keep)
    assert cache.alike == alike
    allocate, calls = LayerStore._allocate, itertools.count()

    def scarce(self, like, capacity):
        if next(calls) == 3:  # keys and values of one layer have moved
            raise torch.OutOfMemoryError
        return allocate(self, like, capacity)

    monkeypatch.setattr(LayerStore, "_allocate", scarce)
    with pytest.raises(torch.OutOfMemoryError):
        cache.commit()
    assert cache.seen == 0
    assert cache.nbytes() == 0
    monkeypatch.undo()
    feed(cache, 3)
    assert cache.kept().tolist() == [[3] * cache.batch] * LAYERS


@pytest.mark.parametrize("policy", ["dense", "window:sinks=1,recent=3"])
def test_a_model_goes_on_as_if_a_failed_forward_had_not_been(tiny_llama, policy):
    model = anee.load(tiny_llama, policy)
    prompt, more = torch.arange(2, 14).reshape(2, 6), torch.tensor([[20, 21], [22, 23]])
    wanted_cache, cache = model.new_cache(), model.new_cache()
    with torch.no_grad():
        for each in (wanted_cache, cache):
            model(prompt, past_key_values=each)
        wanted = model(more, past_key_values=wanted_cache).logits

        def fail(*args):
            raise KeyboardInterrupt

        hook = tiny_llama.model.layers[2].register_forward_pre_hook(fail)
        before = snapshot(cache)
        with pytest.raises(KeyboardInterrupt):
            model(more, past_key_values=cache)
        hook.remove()
        assert_same(before, snapshot(cache))
        assert torch.equal(model(more, past_key_values=cache).logits, wanted)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["tiny_llama", "tiny_gpt2"])
def test_a_plain_transformers_model_is_refused_in_words(family, attention, request):
    model = request.getfixturevalue(family)
    used = model.config._attn_implementation
    model.set_attn_implementation(attention)
    try:
        with pytest.raises(CacheError, match="driven by ANEE's engine: pass it to an AdaptiveModel"):
            model(torch.tensor([[5, 6, 7]]), past_key_values=AdaptiveCache(model.config.num_hidden_layers))
    finally:
        model.set_attn_implementation(used)
