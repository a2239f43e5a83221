"""What works in training only works in training."""

import pytest
import torch
from tiny import adaptive, build, tokens

from anee_core.errors import InputError

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


@pytest.mark.parametrize("family", ["biogpt", "starcoder2", "xglm"])
def test_embeddings_that_no_module_drops_are_dropped_in_training_too(family):
    network, ids = build(family), tokens()
    model = adaptive(network, fast=False)
    still = model(ids).logits
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
