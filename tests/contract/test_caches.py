"""A cache is one of the model's own, and of the batch that it is used for."""

import pytest
import torch
from tiny import FIVE, SEVEN, adaptive, shared, tokens
from transformers.cache_utils import DynamicCache, StaticCache

from anee_core.errors import CacheError, InputError


@pytest.mark.parametrize("family", SEVEN)
@torch.no_grad()
def test_a_cache_of_transformers_is_refused_empty_or_filled(family):
    network, ids = shared(family), tokens()
    model, filled = adaptive(network), DynamicCache(config=network.config)
    network(ids, past_key_values=filled)
    empty = DynamicCache(config=network.config), StaticCache(config=network.config, max_cache_len=20)
    for cache in (filled, *empty):
        with pytest.raises(InputError, match=r"not even an empty one: start from model.new_cache\(\)"):
            model(ids, past_key_values=cache)
        with pytest.raises(InputError, match=r"not even an empty one: start from model.new_cache\(\)"):
            model.generate(ids, past_key_values=cache, max_new_tokens=2)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("policy", FIVE)
@pytest.mark.parametrize("family", SEVEN)
@torch.no_grad()
def test_another_batch_is_refused_whatever_the_cache_holds(family, policy, rows):
    model = adaptive(shared(family), policy)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1] * 8])
    cache = model(tokens(2, 8), attention_mask=mask).past_key_values
    for tokens_again in (1, 2):
        with pytest.raises(CacheError, match=f"holds 2 rows and got {rows}: start a new cache, or reorder this one"):
            model(tokens(rows, tokens_again), past_key_values=cache)
    assert cache.seen == 8
    assert model(tokens(2, 1), past_key_values=cache).logits.shape[0] == 2


@pytest.mark.parametrize("policy", FIVE)
@pytest.mark.parametrize("family", SEVEN)
@torch.no_grad()
def test_layers_are_not_cut_by_hand_but_by_the_cache(family, policy):
    """As the pipeline of kvpress does it between two questions on one context."""
    model, context = adaptive(shared(family), policy), tokens(1, 20)
    questions = tokens(1, 3, seed=1), tokens(1, 4, seed=2)
    expected = []
    for question in questions:
        cache = model(context).past_key_values
        expected.append(model(question, past_key_values=cache).logits)
    cache = model(context).past_key_values
    cache.activate_past_recording()
    for question, wanted in zip(questions, expected, strict=True):
        assert torch.equal(model(question, past_key_values=cache).logits, wanted)
        for layer in cache.layers:
            for name in ("keys", "values"):
                with pytest.raises(CacheError, match=r"call cache.crop\(length\) or cache.rollback\(count\)"):
                    setattr(layer, name, getattr(layer, name)[:, :, :20])
        cache.crop(20)
        cache.activate_past_recording()
