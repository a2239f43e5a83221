"""With every layer run and every token kept, ANEE is transformers: what the conformance suite leaves open."""

import pytest
import torch
from tiny import FAMILIES, adaptive, build, shared, tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_and_loss_are_those_of_transformers(family):
    model, ids = shared(family), tokens()
    mine = adaptive(model)(ids, labels=ids, output_hidden_states=True)
    other = model(ids, labels=ids, output_hidden_states=True)
    assert torch.equal(mine.loss, other.loss)
    assert len(mine.hidden_states) == len(other.hidden_states)
    for a, b in zip(mine.hidden_states, other.hidden_states, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_transformers(family):
    model, ids = build(family), tokens()
    gradients = []
    for run in (adaptive(model), model):
        model.zero_grad()
        run(ids, labels=ids).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_in_place_of_ids(family):
    model, ids = shared(family), tokens()
    embedded = model.get_input_embeddings()(ids)
    ours = adaptive(model)
    assert torch.equal(ours(inputs_embeds=embedded).logits, ours(ids).logits)


def test_tuple_output_and_no_cache_on_request():
    model, ids = adaptive(build("llama")), tokens()
    result = model(ids, use_cache=False, return_dict=False)
    assert len(result) == 1
    assert torch.equal(result[0], model(ids).logits)
    assert model(ids, logits_to_keep=3).logits.shape[1] == 3


def test_inference_keeps_no_graph():
    model = adaptive(build("llama"))
    cache = model(tokens()).past_key_values
    assert not any(layer.keys.requires_grad or layer.values.requires_grad for layer in cache.layers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cache_has_the_dtype_of_the_model(dtype):
    cache = adaptive(build("gpt2", dtype=dtype))(tokens()).past_key_values
    assert {layer.keys.dtype for layer in cache.layers} == {dtype}
