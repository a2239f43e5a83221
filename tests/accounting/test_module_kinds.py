"""What is counted of layers whose linear maps are of other kinds than plain ones, and what is refused."""

import warnings

import pytest
import torch
from tiny import adaptive, build, tokens
from torch import nn

from anee_core.errors import ModelError

POLICIES = ("dense", "static:skip=1 3", "random:p=0.4,protect=0 0", "window:sinks=1,recent=4")
IDS = tokens(1, 12)


class Packed(nn.Module):
    """A linear map of packed weights that does not say how large it is."""

    def __init__(self, linear):
        super().__init__()
        self.register_buffer("qweight", linear.weight.detach().to(torch.int32))
        self.inner = (linear,)

    def forward(self, states):
        return self.inner[0](states)


class Unknown(nn.Module):
    """A module that hides all that it computes."""

    def __init__(self, module):
        super().__init__()
        self.hidden = (module,)

    def forward(self, *args, **kwargs):
        return self.hidden[0](*args, **kwargs)


def dynamic(network):
    """Quantise every linear map of a model as torch does for the CPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(network, {nn.Linear}, dtype=torch.qint8)


def parametrized(network):
    """Let every matrix of the layers be computed from another."""
    for module in list(network.model.layers.modules()):
        if isinstance(module, nn.Linear):
            nn.utils.parametrizations.weight_norm(module)
    return network


@pytest.mark.parametrize("change", [dynamic, parametrized])
@pytest.mark.parametrize("policy", POLICIES)
@torch.no_grad()
def test_linear_maps_that_keep_their_weights_in_parts_are_counted_as_plain_ones(policy, change):
    model, plain = adaptive(change(build("llama")), policy), adaptive(build("llama"), policy)
    logits = model(IDS).logits
    plain(IDS)
    assert model.last_trace.flops == plain.last_trace.flops
    assert model.last_trace.budget_spent == plain.last_trace.budget_spent
    if policy == "dense":
        torch.testing.assert_close(logits, change(build("llama"))(IDS).logits)
    assert adaptive(change(build("llama")), "heuristic:protect=1 1", 0.7).budget == 0.7


def test_packed_weights_take_the_bytes_that_they_have():
    model, plain = adaptive(dynamic(build("llama"))), adaptive(build("llama"))
    for mine, other in zip(model.engine.costs.run, plain.engine.costs.run, strict=True):
        assert 0.25 < mine.weight_bytes / other.weight_bytes < 0.3


def test_packed_weights_of_unknown_size_are_refused():
    network = build("llama")
    network.model.layers[2].mlp.up_proj = Packed(network.model.layers[2].mlp.up_proj)
    with pytest.raises(ModelError, match=r"'mlp.up_proj' of LlamaDecoderLayer is a Packed of packed weights that does"):
        adaptive(network)


def test_a_layer_of_which_nothing_is_known_is_refused():
    network = build("llama")
    layer = network.model.layers[1]
    for block in (layer.self_attn, layer.mlp):
        for name, module in list(block.named_children()):
            setattr(block, name, Unknown(module))
    with pytest.raises(ModelError, match=r"layer 1 has no matrix product that can be counted.*LlamaRMSNorm, Unknown;"):
        adaptive(network)


def test_layers_of_no_plain_linear_maps_are_not_quantised():
    with pytest.raises(ModelError, match="takes plain linear maps, and the layers hold none; leave it out"):
        adaptive(dynamic(build("llama")), weights="int8")


def test_counting_costs_draws_no_random_numbers():
    network = build("gpt2").train()
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    adaptive(network)
    assert torch.equal(torch.rand(1), expected)
