"""What a token sees goes by the order of tokens; positions that the caller gives are for the model to encode."""

import itertools

import pytest
import torch
from tiny import FIVE, SEVEN, adaptive, build, shared, stepwise, tokens

POSITIONS = {
    "restarting": [0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3],
    "repeated": [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5],
    "jumping": [0, 1, 2, 3, 4, 5, 40, 41, 42, 43, 44, 45],
    "falling": [11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0],
}


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("family", SEVEN)
@torch.no_grad()
def test_given_positions_mean_what_they_do_in_transformers(family, positions):
    given, ids = torch.tensor([POSITIONS[positions]]), tokens(2, 12)
    for attention in (None, "eager"):
        network = shared(family, attention)
        model = adaptive(network, fast=False)
        for cached in (True, False):
            expected = network(ids, position_ids=given, use_cache=cached).logits
            found = model(ids, position_ids=given, use_cache=cached).logits
            torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("policy", FIVE)
@pytest.mark.parametrize("family", SEVEN)
@torch.no_grad()
def test_no_token_sees_a_later_one_whatever_its_position(family, policy):
    model, ids = adaptive(shared(family), policy), tokens(1, 12)
    changed = ids.clone()
    changed[0, -1] = 2 + ids[0, -1] % 90
    for name, positions in POSITIONS.items():
        given = torch.tensor([positions])
        whole = model(ids, position_ids=given).logits
        other = model(changed, position_ids=given).logits
        torch.testing.assert_close(whole[:, :-1], other[:, :-1], atol=2e-5, rtol=1e-4, msg=name)
        cache = model.new_cache()
        steps = [
            model(ids[:, t : t + 1], position_ids=given[:, t : t + 1], past_key_values=cache).logits for t in range(12)
        ]
        torch.testing.assert_close(torch.cat(steps, dim=1), whole, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("policy", FIVE)
@pytest.mark.parametrize("family", SEVEN)
def test_packed_documents_are_as_if_alone(family, policy):
    model, ids = adaptive(shared(family), policy), tokens(2, 12)
    given = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3], [*range(7), *range(5)]])
    found = model(ids, position_ids=given, use_cache=False, output_hidden_states=True, labels=ids)
    for row, edges in enumerate(((0, 5, 8, 12), (0, 7, 12))):
        for a, b in itertools.pairwise(edges):
            alone = model(ids[row : row + 1, a:b], output_hidden_states=True)
            torch.testing.assert_close(found.logits[row : row + 1, a:b], alone.logits, atol=2e-5, rtol=1e-4)
            torch.testing.assert_close(
                found.hidden_states[3][row : row + 1, a:b], alone.hidden_states[3], atol=2e-5, rtol=1e-4
            )
    last = model(ids, position_ids=given, use_cache=False, logits_to_keep=2).logits
    torch.testing.assert_close(last, found.logits[:, -2:], atol=2e-5, rtol=1e-4)
    assert found.loss.requires_grad


@torch.no_grad()
def test_packed_embeddings_are_as_packed_ids():
    model, ids = adaptive(shared("gpt2"), "static:skip=1 3"), tokens(2, 12)
    given = torch.tensor([[*range(5), *range(7)]])
    found = model(inputs_embeds=model.parts.embedding(ids), position_ids=given, use_cache=False).logits
    torch.testing.assert_close(found, model(ids, position_ids=given, use_cache=False).logits)


@torch.no_grad()
def test_positions_may_be_given_along_a_cache():
    model, ids = adaptive(build("llama"), "static:skip=1"), tokens(2, 9)
    cache = model.new_cache()
    given = torch.tensor([[0, 1, 2, 7, 8]])
    model(ids[:, :5], position_ids=given, past_key_values=cache)
    # From then on positions are counted: the next one follows the number of tokens, as in transformers.
    rest = model(ids[:, 5:], past_key_values=cache).logits
    whole = model(ids, position_ids=torch.cat((given, torch.tensor([[5, 6, 7, 8]])), dim=1)).logits
    torch.testing.assert_close(rest, whole[:, 5:])


@torch.no_grad()
def test_counted_positions_are_those_of_before():
    model, ids = adaptive(build("gpt2")), tokens(2, 9)
    torch.testing.assert_close(stepwise(model, ids), model(ids, position_ids=torch.arange(9)[None]).logits)
