"""Ids, positions and embeddings that cannot be: refused wherever they come in."""

import pytest
import torch
from tiny import adaptive, shared, tokens

from anee_core.errors import CacheError, InputError

ONE = torch.tensor([[5]])
NAN = torch.full((1, 1, 32), float("nan"))


@torch.no_grad()
@pytest.mark.parametrize("filled", [False, True])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"input_ids": torch.tensor([[97]])}, "token id 97 is not in the vocabulary of 97"),
        ({"input_ids": torch.tensor([[-1]])}, "token id -1 is not in the vocabulary"),
        ({"input_ids": ONE, "position_ids": torch.tensor([[-1]])}, "position_ids are at least 0; got -1"),
        ({"input_ids": ONE, "position_ids": torch.tensor([[0.5]])}, "position_ids are whole numbers"),
        ({"input_ids": ONE, "position_ids": torch.tensor([[128]])}, "position 128 lies beyond the model's context"),
        ({"input_ids": ONE.float()}, "input_ids are whole numbers"),
        ({"input_ids": [[5]]}, "input_ids is a tensor; got list"),
        ({"input_ids": ONE, "attention_mask": [[1]]}, "attention_mask is a tensor; got list"),
        ({"inputs_embeds": NAN}, "inputs_embeds holds numbers that are not finite"),
        ({"inputs_embeds": NAN[..., :31]}, r"inputs_embeds is \[batch, tokens, 32\]"),
    ],
)
def test_single_tokens_are_looked_at_like_prompts(given, message, filled):
    model = adaptive(shared("gpt2"))
    cache = model.new_cache()
    if filled:
        model(tokens(1, 6), past_key_values=cache)
    with pytest.raises(InputError, match=message):
        model(**given, past_key_values=cache)
    assert cache.seen == 6 * filled
    model(ONE, past_key_values=cache)  # and the cache goes on


@torch.no_grad()
def test_positions_of_padding_may_be_anything():
    model, mask = adaptive(shared("llama")), torch.tensor([[0, 0, 1, 1, 1]])
    ids = tokens(1, 5)
    found = model(ids, attention_mask=mask, position_ids=mask.cumsum(1) - 1).logits
    torch.testing.assert_close(found[:, 2:], model(ids[:, 2:]).logits)


@pytest.mark.parametrize("count", [1.5, True, "1", None, -1, 10**20, float("nan")])
def test_a_rollback_is_by_a_whole_number_of_tokens(count):
    model = adaptive(shared("llama"))
    cache = model.new_cache()
    with torch.no_grad():
        model(tokens(1, 6), past_key_values=cache)
    with pytest.raises(CacheError, match=r"cannot roll back|the number of tokens to roll back is a whole number"):
        cache.rollback(count)
    assert cache.seen == 6


@torch.no_grad()
@pytest.mark.parametrize(
    "rows",
    [
        torch.tensor([2]),
        torch.tensor([-1]),
        torch.tensor([0.0]),
        torch.tensor([[0]]),
        torch.tensor([], dtype=torch.long),
        [0],
    ],
)
def test_rows_to_reorder_are_those_that_there_are(rows):
    model = adaptive(shared("llama"))
    cache = model.new_cache()
    model(tokens(2, 6), past_key_values=cache)
    with pytest.raises(CacheError, match=r"rows are a tensor \[N\] of numbers from 0 to 1"):
        cache.reorder(rows)
    assert model(tokens(2, 1), past_key_values=cache).logits.shape[0] == 2


@pytest.mark.parametrize("capacity", [-1, 2.5, "9", True, 10**20])
def test_a_capacity_is_a_number_of_tokens(capacity):
    with pytest.raises(CacheError, match="capacity is a whole number, at least 0 and at most 2,147,483,647"):
        adaptive(shared("llama")).new_cache(capacity)
