"""Models with quantised weights."""

import copy

import pytest
import torch
from tiny import QUICK, skipping_equals_removing
from torch import nn

import anee
from anee_core.calibration.fingerprint import fingerprint
from anee_core.errors import AneeError, ModelError

IDS = torch.randint(2, 97, (2, 11), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=["tiny_llama", "tiny_gpt2"])
def quantised(request):
    """A model with int8 weights in every linear layer (GPT-2 has but one: the rest is transposed)."""
    torchao = pytest.importorskip("torchao.quantization")
    network = copy.deepcopy(request.getfixturevalue(request.param))
    torchao.quantize_(network, torchao.Int8WeightOnlyConfig())
    assert any(type(parameter) is not nn.Parameter for parameter in network.parameters())
    return network


def test_quantised_model_gives_its_own_logits(quantised):
    assert torch.equal(anee.load(quantised)(IDS).logits, quantised(IDS).logits)


def test_quantised_model_skips_and_saves(quantised):
    model = anee.load(quantised, "static:skip=1 2")
    skipping_equals_removing(model, quantised, IDS)
    assert model.last_trace.budget_spent < 0.65
    weights = model.last_trace.weight_bytes
    assert weights["spent"] < weights["dense"]
    sequences = model.decode(IDS, max_new_tokens=5).sequences
    chosen = model(sequences[:, :-1]).logits.argmax(-1)
    assert torch.equal(chosen[:, IDS.shape[1] - 1 :], sequences[:, IDS.shape[1] :])


def test_quantised_model_calibrates_and_is_told_from_others(quantised):
    def load(network):
        return anee.load(network, "heuristic:protect=1 1", 0.7, calibration=QUICK).policy.calibration

    found = load(quantised)
    assert found.importance.isfinite().all()
    assert load(quantised).fingerprint == found.fingerprint
    torchao = pytest.importorskip("torchao.quantization")
    other = type(quantised)(quantised.config).eval()
    torchao.quantize_(other, torchao.Int8WeightOnlyConfig())
    assert load(other).fingerprint != found.fingerprint


def test_weights_of_different_precision_are_told_apart(tiny_llama):
    networks = {weights: copy.deepcopy(tiny_llama) for weights in (None, "int8", "int4")}
    prints = {weights: fingerprint(anee.load(network, weights=weights)) for weights, network in networks.items()}
    assert len(set(prints.values())) == 3


def test_what_is_not_plain_is_not_quantised_and_stays_as_it_was(tiny_llama):
    small = copy.deepcopy(tiny_llama)
    anee.load(small, weights="int8")
    with pytest.raises(ModelError, match="is quantised, wrapped or hooked already"):
        anee.load(small, weights="int4")
    odd = copy.deepcopy(tiny_llama)
    odd.model.layers[-1].mlp.down_proj = nn.Linear(33, odd.config.hidden_size)  # int4 takes multiples of 32
    with pytest.raises(AneeError):
        anee.load(odd, weights="int4")
    assert all(type(module) is nn.Linear for name, module in odd.named_modules() if name.endswith("_proj"))
