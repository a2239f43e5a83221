"""The storage of the cache: how it grows and shrinks, and that bits and dtypes survive it."""

import gc
import weakref

import pytest
import torch
from filled_cache import CLOSE, HEADS, LAYERS, WIDTH, attend, evict_but_last, feed, open_block, some

import anee
from anee_core.cache import AdaptiveCache
from anee_core.cache.layer_store import LayerStore
from anee_core.cache.writer import CacheWriter


def storage_bytes(batch, capacity, itemsize=4):
    return LAYERS * 2 * batch * HEADS * capacity * WIDTH * itemsize


def test_storage_grows_by_doubling_and_is_written_in_place_in_between():
    cache = AdaptiveCache(LAYERS)
    feed(cache, 7)
    capacities, places = [], set()
    for step in range(300):
        feed(cache, 1, seed=step)
        store = cache.layers[1]
        capacities.append(store.keys.shape[2])
        places.add((store.keys.shape[2], store.keys.data_ptr(), store.values.data_ptr()))
    assert sorted(set(capacities)) == [64, 128, 256, 512]
    assert len(places) == 4


def test_a_token_that_fits_allocates_no_storage_and_concatenates_nothing(monkeypatch):
    cache = AdaptiveCache(LAYERS, capacity=100)
    feed(cache, 10)

    def refuse(*args, **kwargs):
        raise AssertionError("there is room for this token")

    monkeypatch.setattr(torch, "cat", refuse)
    monkeypatch.setattr(LayerStore, "_allocate", refuse)
    for step in range(90):
        feed(cache, 1, seed=step)
    monkeypatch.undo()
    assert cache.nbytes() == storage_bytes(2, 100)


def test_layers_that_hold_the_same_tokens_share_their_bookkeeping():
    cache = AdaptiveCache(LAYERS)
    feed(cache, 4)
    assert len({id(slots) for slots in cache.slots}) == 1
    cache.evict(1, torch.ones(2, 1, 4, dtype=torch.bool))
    assert cache.slots[0] is cache.slots[2]
    assert cache.slots[0] is not cache.slots[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_and_bits_survive_growth_compaction_and_reordering(dtype):
    cache = AdaptiveCache(LAYERS)
    feed(cache, 50, dtype=dtype)
    written = feed(cache, 30, dtype=dtype, seed=1)
    open_block(cache, 1, dtype=dtype, seed=2)
    evict_but_last(cache, 6)
    cache.commit()
    cache.reorder(torch.tensor([1, 0, 1]))
    for layer in range(LAYERS):
        for held, given in zip(cache.keys_values(layer), written[layer], strict=True):
            assert held.dtype == dtype
            assert torch.equal(held[:, :, :5], given[[1, 0, 1], :, -5:])
    assert cache.nbytes() == storage_bytes(3, cache.slots[0].capacity, itemsize=dtype.itemsize)


def test_eviction_frees_memory_at_commit():
    cache = AdaptiveCache(LAYERS)
    feed(cache, 200)
    open_block(cache, 1)
    full = cache.nbytes()
    assert full == storage_bytes(2, 400)
    evict_but_last(cache, 18)
    assert cache.nbytes() == full
    cache.commit()
    # 18 tokens at a load factor of 0.9, and 16 to spare.
    assert [store.keys.shape[2] for store in cache.layers] == [36] * LAYERS
    assert [slots.capacity for slots in cache.slots] == [36] * LAYERS
    assert cache.nbytes() == storage_bytes(2, 36)


def test_layers_shrink_each_to_their_own_size():
    cache = AdaptiveCache(LAYERS)
    feed(cache, 100)
    cache.evict(0, (torch.arange(100) >= 91).expand(2, 1, -1))
    cache.evict(1, torch.stack((torch.arange(100) >= 55, torch.arange(100) >= 99))[:, None])
    cache.commit()
    assert [store.keys.shape[2] for store in cache.layers] == [26, 66, 100]
    assert cache.kept().tolist() == [[9, 9], [45, 1], [100, 100]]


def test_dropping_few_tokens_moves_nothing():
    cache = AdaptiveCache(LAYERS)
    feed(cache, 100)
    place = cache.layers[0].keys.data_ptr()
    cache.evict(0, (torch.arange(100) >= 9).expand(2, 1, -1))
    cache.commit()
    assert cache.layers[0].keys.data_ptr() == place
    assert cache.kept()[0].tolist() == [91, 91]


def test_memory_stays_bounded_under_a_steady_window():
    cache = AdaptiveCache(LAYERS)
    feed(cache, 64)
    sizes = []
    for step in range(150):
        open_block(cache, 1, seed=step)
        evict_but_last(cache, 20)
        cache.commit()
        sizes.append(cache.nbytes())
    assert set(sizes) == {storage_bytes(2, 38)}
    assert cache.get_seq_length() == 214


def test_compaction_does_not_touch_tensors_handed_out_before():
    cache = AdaptiveCache(LAYERS)
    feed(cache, 60)
    cache.begin(torch.full((2, 1), 60), None)
    handed_out = []
    for layer in range(LAYERS):
        rows = (torch.tensor([[1], [0]]), torch.tensor([[0], [0]])) if layer == 1 else (None, None)
        new = [some(2, HEADS, 1, WIDTH, seed=50 + i) for i in (0, 1)]
        handed_out += CacheWriter(cache, layer, *rows).update(*new, layer)
    for layer in range(LAYERS):
        handed_out += cache.keys_values(layer)
    copies = [t.clone() for t in handed_out]
    evict_but_last(cache, 5)
    cache.commit()
    feed(cache, 30, seed=2)
    assert all(torch.equal(old, copy) for old, copy in zip(handed_out, copies, strict=True))


def test_compaction_changes_no_attention_output():
    cache = AdaptiveCache(LAYERS)
    feed(cache, 90, batch=3, real=torch.arange(90) >= torch.tensor([[0], [7], [40]]))
    open_block(cache, 4, batch=3, seed=1)
    for layer, chance in enumerate((0.2, 0.5, 0.05)):
        cache.evict(layer, torch.rand(3, 1, 94, generator=torch.Generator().manual_seed(layer)) < chance)
    query, position = some(3, HEADS, 2, WIDTH), torch.tensor([[92, 94]] * 3)
    before = [attend(cache, layer, query, position, window) for layer in range(LAYERS) for window in (None, 20)]
    capacities = [slots.capacity for slots in cache.slots]
    cache.commit()
    assert all(slots.capacity < old for slots, old in zip(cache.slots, capacities, strict=True))
    after = [attend(cache, layer, query, position, window) for layer in range(LAYERS) for window in (None, 20)]
    for old, new in zip(before, after, strict=True):
        torch.testing.assert_close(old, new, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_slots_that_were_never_written_give_no_nan(dtype):
    cache = AdaptiveCache(1)
    # Freed memory full of NaN is what an allocation that is not cleared would pick up.
    for shape in [(2, HEADS, 6, WIDTH)] * 8 + [(2, HEADS, 64, WIDTH)] * 8:
        torch.full(shape, torch.nan, dtype=dtype)
    real = torch.tensor([[False] * 4 + [True] * 2, [True] * 6])
    cache.begin(torch.tensor([[0, 0, 0, 0, 0, 1], [0, 1, 2, 3, 4, 5]]), real)
    skipped = (torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1]]), torch.tensor([[4, 5, 0, 1, 2, 3, 4, 5]]))
    cache.write(0, *(some(1, HEADS, 8, WIDTH, seed=i, dtype=dtype) for i in (0, 1)), *skipped)
    query = some(2, HEADS, 1, WIDTH, dtype=dtype)
    for count in (1, 70):
        # The second query sees nothing at all.
        for position in (torch.tensor([[5], [5]]), torch.tensor([[-1], [-1]])):
            assert torch.isfinite(attend(cache, 0, query, position)).all()
        cache.commit()
        cache.begin(torch.arange(6, 6 + count).expand(2, -1), None)
        assert all(torch.isfinite(states).all() for states in cache.keys_values(0))


def test_reset_frees_the_storage_and_takes_another_batch_size():
    cache = AdaptiveCache(LAYERS)
    feed(cache, 40)
    evict_but_last(cache, 4)
    cache.commit()
    cache.reset()
    assert (cache.get_seq_length(), cache.nbytes(), cache.kept().numel()) == (0, 0, 0)
    feed(cache, 3, batch=5)
    cache.rollback(1)
    assert cache.kept().tolist() == [[2] * 5] * LAYERS


def test_nbytes_of_an_empty_cache_is_zero_and_reordering_it_does_nothing():
    cache = AdaptiveCache(LAYERS, capacity=1000)
    cache.reorder(torch.tensor([0, 0]))
    cache.commit()
    cache.rollback(0)
    assert cache.nbytes() == 0
    feed(cache, 3, batch=4)
    assert cache.nbytes() == storage_bytes(4, 1000)


def test_memory_goes_with_the_last_reference(tiny_llama):
    gc.collect()
    gc.disable()
    try:
        model = anee.load(tiny_llama, "window:sinks=1,recent=3")
        with torch.no_grad():
            cache = model(torch.randint(3, 97, (1, 9))).past_key_values
            model(torch.randint(3, 97, (1, 1)), past_key_values=cache)
        keys = weakref.ref(cache.layers[0].keys)
        del cache
        assert keys() is None
    finally:
        gc.enable()
