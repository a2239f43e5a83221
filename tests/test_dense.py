"""With every layer run and every token kept, ANEE is transformers."""

import pytest
import torch
from tiny import FAMILIES, adaptive, build, ragged, stepwise, tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
class TestDense:
    def test_whole_sequence_is_bit_identical(self, family, attention, dtype):
        model, ids = build(family, attention, dtype), tokens()
        with torch.no_grad():
            assert torch.equal(adaptive(model)(ids).logits, model(ids).logits)

    def test_cached_decoding_is_bit_identical(self, family, attention, dtype):
        model, ids = build(family, attention, dtype), tokens(length=14)
        ours, cache, theirs = adaptive(model), None, None
        with torch.no_grad():
            for part in (ids[:, :6], ids[:, 6:7], ids[:, 7:8], ids[:, 8:12], ids[:, 12:]):
                mine = ours(part, past_key_values=cache)
                other = model(part, past_key_values=theirs, use_cache=True)
                cache, theirs = mine.past_key_values, other.past_key_values
                if part.shape[1] in (1, 6) and family != "qwen2-sliding":
                    assert torch.equal(mine.logits, other.logits)
                else:
                    # Where the mask is a bool one there, or the slots outside a window are gone there and masked
                    # here, sums are taken in another order.
                    torch.testing.assert_close(mine.logits, other.logits)

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padded_batch_is_that_of_transformers(self, family, attention, dtype, side):
        model = build(family, attention, dtype)
        ids, mask = ragged([3, 9, 6], side, extra=2)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            mine = adaptive(model)(ids, attention_mask=mask).logits
            other = model(ids, attention_mask=mask, position_ids=positions).logits
        real = mask.bool()
        if dtype == torch.float32:
            assert torch.equal(mine[real], other[real])
        else:
            torch.testing.assert_close(mine[real], other[real])


@pytest.mark.parametrize("family", FAMILIES)
def test_stepwise_is_the_whole_sequence(family):
    model, ids = adaptive(build(family)), tokens()
    torch.testing.assert_close(stepwise(model, ids), model(ids).logits, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_and_loss_are_those_of_transformers(family):
    model, ids = build(family), tokens()
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
    model, ids = build(family), tokens()
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
