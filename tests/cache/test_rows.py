"""Rows that are repeated, selected and followed, and copies that go their own way."""

import copy
import pickle

import pytest
import torch
from filled_cache import LAYERS, assert_same, feed, snapshot

from anee_core.cache import AdaptiveCache
from anee_core.cache.token_logs import FeedbackLog


def test_rows_can_be_repeated_selected_and_followed():
    cache = AdaptiveCache(LAYERS)
    feed(cache, 4, real=torch.tensor([[False, True, True, True], [True, True, True, True]]))
    cache.feedback = FeedbackLog(2, torch.device("cpu"), 4, 0.5)
    cache.feedback.record(4, torch.tensor([[0.25], [0.75]]), torch.tensor([[0.1, 0.2], [0.3, 0.4]]), None)
    spent = [2.25, 2.75]
    rows = snapshot(cache)[1]

    def assert_rows(order):
        length, after = snapshot(cache)
        assert_same((4, [rows[2 * layer + row] for layer in range(LAYERS) for row in order]), (length, after))
        assert cache.feedback.entry(5)[:, 0, 2].tolist() == [spent[row] for row in order]

    cache.batch_repeat_interleave(2)
    assert_rows([0, 0, 1, 1])
    cache.batch_select_indices(torch.tensor([3, 0]))
    assert_rows([1, 0])
    cache.reorder_cache(torch.tensor([1, 1]))
    assert_rows([0, 0])


def test_copies_of_a_row_go_their_own_way():
    cache = AdaptiveCache(LAYERS)
    feed(cache, 3, batch=1)
    cache.batch_repeat_interleave(2)
    cache.evict(0, torch.tensor([[[True, True, True]], [[False, False, True]]]))
    written = feed(cache, 1, batch=2, seed=1)
    assert cache.kept().tolist() == [[4, 2], [4, 4], [4, 4]]
    _, keys, _ = snapshot(cache)[1][1]
    assert torch.equal(keys[:, -1:], written[0][0][1])


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_a_copy_goes_its_own_way(copied):
    cache = AdaptiveCache(LAYERS)
    feed(cache, 5)
    before, other = snapshot(cache), copied(cache)
    feed(other, 3, seed=1)
    assert_same(before, snapshot(cache))
    assert other.layers[0].get_seq_length() == 8
    assert cache.layers[0].get_seq_length() == 5
    del cache
    feed(other, 90, seed=2)
    assert other.kept().tolist() == [[98, 98]] * LAYERS
