"""The modules that run are those that the model has now, whatever was put in their place after loading."""

import pytest
import torch
from tiny import SEVEN, adaptive, build, tokens
from torch import nn

CLOSE = {"atol": 5e-5, "rtol": 1e-3}


def another_embedding(network):
    network.set_input_embeddings(nn.Embedding(97, 32))


def another_head(network):
    network.set_output_embeddings(nn.Linear(32, 97, bias=False))


def more_tokens(network):
    network.resize_token_embeddings(120)


def fewer_layers(network):
    for owner in list(network.modules()):
        for name, child in owner.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == 6:
                setattr(owner, name, child[:4])
    network.config.num_hidden_layers = 4


CHANGES = (another_embedding, another_head, more_tokens, fewer_layers)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("family", SEVEN)
@torch.no_grad()
def test_modules_replaced_after_loading_are_used(family, fast, change):
    network, ids = build(family), tokens()
    model = adaptive(network, fast=fast)
    before = model(ids).logits
    torch.manual_seed(5)
    change(network)
    expected = network(ids, use_cache=False).logits
    assert expected.shape != before.shape or not torch.allclose(expected, before, **CLOSE)
    torch.testing.assert_close(model(ids).logits, expected, **CLOSE)
    assert model.config.vocab_size == network.config.vocab_size
    found = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(found, network.generate(ids, max_new_tokens=4, do_sample=False))


PARTS = (
    {"target_modules": ["q_proj"]},
    {"target_modules": ["lm_head"]},
    {"target_modules": ["embed_tokens"]},
    {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
    {"target_modules": ["q_proj"], "trainable_token_indices": [5, 6, 7]},
)


@pytest.mark.parametrize("parts", PARTS, ids=str)
@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("family", ["llama", "mistral"])
@torch.no_grad()
def test_peft_may_come_after_and_around(family, fast, parts):
    peft = pytest.importorskip("peft")

    def wrapped(model):
        torch.manual_seed(2)
        found = peft.get_peft_model(model, peft.LoraConfig(r=4, **parts)).eval()
        generator = torch.Generator().manual_seed(1)
        for parameter in found.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
        return found

    ids = tokens()
    plain = wrapped(build(family))
    expected = plain(input_ids=ids, use_cache=False).logits
    assert not torch.allclose(expected, build(family)(ids).logits, **CLOSE)
    network = build(family)
    model = adaptive(network, fast=fast)
    model(ids)
    wrapped(network)
    torch.testing.assert_close(model(ids).logits, expected, **CLOSE)
    around = wrapped(adaptive(build(family), fast=fast))
    torch.testing.assert_close(around(input_ids=ids).logits, expected, **CLOSE)
    torch.testing.assert_close(adaptive(plain, fast=fast)(ids).logits, expected, **CLOSE)
