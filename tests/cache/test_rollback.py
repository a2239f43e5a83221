"""Going back: rollbacks, crops, and what transformers is told of lengths."""

import pytest
import torch
from filled_cache import LAYERS, assert_same, evict_but_last, feed, open_block, snapshot

from anee_core.cache import AdaptiveCache
from anee_core.errors import CacheError


def test_dropped_tokens_come_back_on_rollback_while_recording():
    cache = AdaptiveCache(LAYERS)
    feed(cache, 40)
    cache.activate_past_recording()
    before = snapshot(cache)
    for step in range(5):
        open_block(cache, 2, seed=step + 1)
        evict_but_last(cache, 3)
        cache.commit()
    assert cache.kept().tolist() == [[3, 3]] * LAYERS
    cache.rollback(10)
    assert_same(before, snapshot(cache))


def test_a_drop_between_forwards_makes_no_earlier_one_final_while_recording():
    cache = AdaptiveCache(LAYERS)
    cache.activate_past_recording()
    open_block(cache, 2)
    cache.evict(0, torch.tensor([[True, False], [False, True]]).expand(2, -1, -1))
    cache.commit()
    feed(cache, 1)
    evict_but_last(cache, 1)
    cache.rollback(1)
    assert cache.kept().tolist() == [[1, 1], [2, 2], [2, 2]]
    cache.rollback(2)
    assert cache.seen == 0


def test_tokens_taken_back_make_no_later_drop_final():
    cache = AdaptiveCache(LAYERS)
    feed(cache, 1)
    cache.rollback(1)
    cache.activate_past_recording()
    open_block(cache, 2)
    cache.evict(0, torch.tensor([[False, True], [False, True]]).expand(2, -1, -1))
    cache.commit()
    cache.rollback(2)
    assert cache.seen == 0


def test_rollback_below_freed_tokens_is_refused_and_changes_nothing():
    cache = AdaptiveCache(LAYERS)
    feed(cache, 10)
    evict_but_last(cache, 4)
    cache.commit()
    feed(cache, 3, seed=1)
    before = snapshot(cache)
    with pytest.raises(CacheError, match="freed; call activate_past_recording"):
        cache.rollback(4)
    assert_same(before, snapshot(cache))
    cache.rollback(3)
    assert cache.get_seq_length() == 10


@pytest.mark.parametrize("padded", [False, True])
def test_a_rollback_that_needs_no_freed_token_works_after_compaction(padded):
    cache = AdaptiveCache(LAYERS)
    # Behind the newest real token of every row, slots may hold none.
    real = torch.tensor([[True, padded, False], [True, True, False]]) if padded else None
    feed(cache, 40)
    cache.activate_past_recording()
    evict_but_last(cache, 4)
    feed(cache, 2, seed=1)
    feed(cache, 3, seed=2, real=real)
    cache.keeps_dropped = False
    feed(cache, 1, seed=3)
    assert cache.slots[0].capacity < 40
    cache.rollback(4)
    assert snapshot(cache)[1][0][0].tolist() == [36, 37, 38, 39, 40, 41]
    assert cache.kept().tolist() == [[6, 6]] * LAYERS
    written = feed(cache, 2, seed=4)
    positions, keys, _ = snapshot(cache)[1][0]
    assert positions.tolist() == [36, 37, 38, 39, 40, 41, 42, 43]
    assert torch.equal(keys[:, -2:], written[0][0][0])


def test_an_aborted_drop_does_not_limit_later_rollbacks():
    cache = AdaptiveCache(LAYERS)
    feed(cache, 6)
    before = snapshot(cache)
    open_block(cache, 1, seed=1)
    evict_but_last(cache, 1)
    cache.abort()
    feed(cache, 1, seed=2)
    cache.rollback(1)
    assert_same(before, snapshot(cache))


@pytest.mark.parametrize("count", [-1, 6])
def test_rollback_of_an_impossible_number_is_refused(count):
    cache = AdaptiveCache(LAYERS)
    feed(cache, 5)
    with pytest.raises(CacheError, match=f"cannot roll back {count} tokens: 5 were seen"):
        cache.rollback(count)


def test_crop_takes_a_number_to_remove_or_a_length_to_keep():
    cache = AdaptiveCache(LAYERS)
    feed(cache, 5)
    before = snapshot(cache)
    feed(cache, 3, seed=1)
    assert cache.is_croppable
    cache.crop(0)
    assert cache.get_seq_length() == 8
    cache.crop(-3)
    assert_same(before, snapshot(cache))
    feed(cache, 3, seed=1)
    cache.crop(5)  # as older versions of transformers say it
    assert_same(before, snapshot(cache))
    cache.crop(9)
    assert_same(before, snapshot(cache))


def test_lengths_told_to_transformers_are_logical():
    cache = AdaptiveCache(LAYERS)
    assert cache.get_seq_length() == 0
    assert cache.get_mask_sizes(4, 0) == (4, 0)
    feed(cache, 30)
    evict_but_last(cache, 5)
    cache.commit()
    assert [cache.get_seq_length(layer) for layer in range(LAYERS)] == [30] * LAYERS
    assert [store.get_seq_length() for store in cache.layers] == [30] * LAYERS
    assert cache.get_query_offset(1) == 30
    assert cache.get_mask_sizes(2, 1) == (7, 25)
    assert cache.get_max_length() == -1
    assert not cache.is_compileable
    assert cache.next_positions().tolist() == [[30], [30]]


def test_next_positions_are_zero_in_a_cache_that_was_emptied():
    cache = AdaptiveCache(LAYERS)
    open_block(cache, 3, real=torch.tensor([[False, True, True], [True, True, True]]))
    cache.abort()
    assert cache.next_positions().tolist() == [[0], [0]]
    feed(cache, 3, real=torch.tensor([[False, True, True], [True, True, True]]))
    assert cache.next_positions().tolist() == [[3], [3]]
    cache.rollback(3)
    assert cache.next_positions().tolist() == [[0], [0]]
