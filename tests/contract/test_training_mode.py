"""What works in training only works in training."""

import pytest
import torch
from tiny import FIVE, SEVEN, adaptive, build, tokens

from anee_core.errors import InputError

IDS = tokens(2, 20)
DROPS = {"gpt2": "transformer.drop", "gptj": "transformer.drop", "gpt-neox": "gpt_neox.emb_dropout"}


@pytest.mark.parametrize("family", DROPS)
def test_embeddings_are_dropped_in_training_and_only_then(family):
    network, ids = build(family), tokens()
    for module in network.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model = adaptive(network, fast=False)
    still = model(ids).logits
    network.get_submodule(DROPS[family]).p = 0.5
    torch.testing.assert_close(model(ids).logits, still)
    model.train()
    torch.manual_seed(0)
    expected = network(ids, use_cache=False).logits
    torch.manual_seed(0)
    torch.testing.assert_close(model(ids).logits, expected)
    assert not torch.allclose(expected, still, atol=1e-2)


def test_layers_left_out_at_random_are_refused():
    model, ids = adaptive(build("opt")), tokens()
    model.config.layerdrop = 0.1
    assert torch.isfinite(model(ids).logits).all()
    model.train()
    with pytest.raises(InputError, match=r"config.layerdrop is 0\.1.*set model.config.layerdrop = 0"):
        model(ids)
    model.config.layerdrop = 0.0
    assert torch.isfinite(model(ids).logits).all()


def gradients(family, policy, reentrant=None):
    """Return the gradients of a model's weights, by name, with or without gradient checkpointing."""
    network = build(family)
    model = adaptive(network, policy).train()
    for module in network.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model(IDS, labels=IDS).loss.backward()
    return {name: parameter.grad for name, parameter in network.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("policy", ["dense", "static:skip=1 3", "static:exit=4"])
@pytest.mark.parametrize("family", SEVEN)
def test_gradients_are_the_same_with_checkpointing(family, policy, reentrant):
    plain, found = gradients(family, policy), gradients(family, policy, reentrant)
    assert found.keys() == plain.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(found[name], gradient, msg=name)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize(
    "policy", [*FIVE[2:], "tova:keep=0.5", "h2o:keep=0.5", "static:skip=1+window:sinks=1,recent=4"]
)
def test_checkpointing_is_refused_where_layers_need_the_cache(policy, reentrant):
    with pytest.raises(InputError, match=r"takes the cache from the layers.*call model.gradient_checkpointing_disable"):
        gradients("llama", policy, reentrant)
    model = adaptive(build("llama"), policy)
    model.gradient_checkpointing_enable()
    assert torch.isfinite(model(IDS).logits).all()


def test_checkpointing_is_refused_where_a_sequence_goes_on():
    model = adaptive(build("llama"))
    model.gradient_checkpointing_enable()
    cache = model(IDS).past_key_values
    model.train()
    with pytest.raises(InputError, match="train a sequence at once, dense or under 'static'"):
        model(IDS, past_key_values=cache)
