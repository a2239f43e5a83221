"""Masks over the slots of a layer, against double loops."""

import itertools

import pytest
import torch
from filled_cache import LAYERS, feed

from anee_core.cache import AdaptiveCache
from anee_core.cache.masks import MaskMaker, additive, visible
from anee_core.cache.slots import Slots


def patchy_slots(batch=3, count=12, seed=0):
    """Return slots with padding, holes and gaps in the positions."""
    generator = torch.Generator().manual_seed(seed)
    position = torch.randint(1, 3, (batch, count), generator=generator).cumsum(1)
    slots = Slots(batch, torch.device("cpu"), count + 5)
    slots.extend(position, torch.rand(batch, count, generator=generator) < 0.7, seen=0)
    slots.evict(torch.rand(batch, 1, count, generator=generator) < 0.7, seen=count)
    return slots


@pytest.mark.parametrize("window", [None, 1, 4, 100])
def test_visibility_is_what_a_double_loop_finds(window):
    slots = patchy_slots()
    query_position = torch.tensor([[0, 3, 7, 30], [5, 5, 6, 7], [12, 11, 10, 1]])
    found = visible(slots, query_position, window)
    assert found.shape == (3, 1, 4, 12)
    for row, query, slot in itertools.product(range(3), range(4), range(12)):
        mine, its = int(query_position[row, query]), int(slots.position[row, slot])
        wanted = bool(slots.valid()[row, slot]) and its <= mine and (window is None or mine - its < window)
        assert bool(found[row, 0, query, slot]) == wanted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_additive_mask_hides_exactly_what_is_not_visible(dtype):
    seen = visible(patchy_slots(), torch.tensor([[9], [9], [9]]), None)
    mask = additive(seen, dtype)
    assert mask.dtype == dtype
    assert torch.equal(mask == 0, seen)
    assert torch.isfinite(mask).all()
    assert (mask.float().softmax(-1)[~seen] == 0).all()


@pytest.mark.parametrize("implicit_causal", [False, True])
@pytest.mark.parametrize("subset", [False, True])
def test_a_mask_is_left_out_only_where_attention_needs_none(implicit_causal, subset):
    left_out = 0
    for first, count, window, padded, dropped in itertools.product(
        (0, 5), (1, 4), (None, 3, 5, 50), (False, True), (False, True)
    ):
        cache = AdaptiveCache(1)
        if first:
            feed(cache, first, real=(torch.arange(first) > 0).expand(2, -1) if padded else None)
        if dropped and first:
            cache.evict(0, (torch.arange(first) != 2).expand(2, 1, -1))
            cache.commit()
        position_ids = torch.arange(first, first + count).expand(2, -1)
        cache.begin(position_ids, None)
        slots = cache.slots[0]
        if MaskMaker(position_ids, torch.float32, implicit_causal).needed(slots, window, subset):
            continue
        left_out += 1
        seen = visible(slots, position_ids, window)
        # Without a mask, every query sees all slots; a causal backend at a first block, those up to its own.
        # The tokens of a subset are not where such a backend takes them to be.
        causal = implicit_causal and not first and not subset
        assert torch.equal(seen, torch.ones_like(seen).tril() if causal else torch.ones_like(seen))
    assert left_out > 0


def test_one_mask_serves_the_layers_that_hold_the_same_tokens():
    cache = AdaptiveCache(LAYERS)
    feed(cache, 5)
    cache.evict(2, (torch.arange(5) > 1).expand(2, 1, -1))
    cache.begin(torch.full((2, 1), 5), None)
    masks = MaskMaker(torch.full((2, 1), 5), torch.float32, implicit_causal=True)
    first = masks.mask(cache.slots[0], None)
    assert masks.mask(cache.slots[1], None) is first
    for slots, window in ((cache.slots[2], None), (cache.slots[0], 3)):
        assert torch.equal(masks.mask(slots, window) == 0, visible(slots, torch.full((2, 1), 5), window))
