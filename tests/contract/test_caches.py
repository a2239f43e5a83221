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
        with pytest.raises(InputError, match=r"from model.new_cache\(\)"):
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
