"""Rows padded on either side generate what they do alone, by every way in."""

import pytest
import torch
from tiny import FIVE, SEVEN, adaptive, build, ragged, shared, tokens

from anee_core.errors import InputError

LENGTHS = (5, 7, 9)
GREEDY = {"max_new_tokens": 6, "do_sample": False}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("policy", FIVE)
@pytest.mark.parametrize("family", SEVEN)
def test_padded_rows_generate_what_they_do_alone(family, policy, side):
    model, (ids, mask) = adaptive(shared(family), policy), ragged(LENGTHS, side)
    alone = [row[kept.bool()][None] for row, kept in zip(ids, mask, strict=True)]
    ways = [{}, {"num_beams": 2}] + [{"use_cache": False}] * model.policy.cache_policy.keeps_all
    for way in ways:
        expected = [model.generate(row, **GREEDY, **way)[0, row.shape[1] :] for row in alone]
        found = model.generate(ids, attention_mask=mask, **GREEDY, **way)
        assert torch.equal(found[:, : ids.shape[1]], ids)
        assert torch.equal(found[:, ids.shape[1] :], torch.stack(expected)), way
        guessed = model.generate(ids, **GREEDY, **way)  # transformers finds the padding by its id
        assert torch.equal(guessed, found)


@pytest.mark.parametrize("helper", ["prompt_lookup_num_tokens", "assistant_model"])
@pytest.mark.parametrize("policy", FIVE)
def test_assisted_rows_padded_on_the_right_generate_what_they_do_alone(policy, helper):
    network = build("llama")
    model, ids = adaptive(network, policy), tokens(1, 6)
    padded = torch.cat((ids, torch.zeros(1, 3, dtype=torch.long)), dim=1)
    mask = (padded > 0).long()
    with_helper = {helper: 3 if helper == "prompt_lookup_num_tokens" else network}
    expected = model.generate(ids, **GREEDY)[:, 6:]
    found = model.generate(padded, attention_mask=mask, **GREEDY, **with_helper)
    assert torch.equal(found[:, 9:], expected)


@torch.no_grad()
def test_last_positions_are_the_last_real_ones():
    model, (ids, mask) = adaptive(build("llama")), ragged(LENGTHS, "right")
    whole = model(ids, attention_mask=mask).logits
    for count in (1, 2, 4):
        found = model(ids, attention_mask=mask, logits_to_keep=count).logits
        for row, length in enumerate(LENGTHS):
            torch.testing.assert_close(found[row], whole[row, length - count : length])
    columns = torch.tensor([0, 3])
    torch.testing.assert_close(model(ids, attention_mask=mask, logits_to_keep=columns).logits, whole[:, columns])


def test_pieces_of_a_prompt_may_begin_with_padding_and_not_end_with_it():
    model = adaptive(build("llama"))
    ids, mask = ragged((3, 11), "left")
    whole = model.generate(ids, attention_mask=mask, **GREEDY)
    assert torch.equal(model.generate(ids, attention_mask=mask, prefill_chunk_size=4, **GREEDY), whole)
    ids, mask = ragged((3, 11), "right")
    with pytest.raises(InputError, match="row 0 of the batch ends with a piece of padding; pad on the left"):
        model.generate(ids, attention_mask=mask, prefill_chunk_size=4, **GREEDY)
    with pytest.raises(InputError, match="row 1 of the batch is all padding; leave it out"):
        model(tokens(2, 3), attention_mask=torch.tensor([[1, 1, 1], [0, 0, 0]]))
