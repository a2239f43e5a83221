"""Equal scores stay equal however many tokens are read at once: repeated tokens in front of the first layer."""

import pytest
import torch
from tiny import adaptive
from transformers import LlamaConfig, LlamaForCausalLM

from anee_core.controllers.gate import GateController, GateWeights
from anee_core.controllers.static import StaticController
from anee_core.interfaces.formulas import TIE, LinearGate
from anee_core.policy import Policy

LAYERS, WIDTH, LENGTH = 3, 256, 40


@pytest.fixture(scope="module")
def network():
    """A model wide enough that sums of its states differ by the order in which they are added up."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=LAYERS, num_attention_heads=4
    )
    return LlamaForCausalLM(config).eval()


def gate():
    """Return a gate under which some tokens skip every layer, the first one too."""
    weight = torch.randn(LAYERS, WIDTH, generator=torch.Generator().manual_seed(1)) * WIDTH**-0.5
    spread, shares = torch.ones(LAYERS), torch.tensor([[0.8] * LAYERS, [0.3] * LAYERS])
    weights = GateWeights(weight, 0 * spread, 0 * spread, spread, torch.tensor([0.4, 1.0]), shares)
    return Policy(GateController.of(weights, protect=(0, 1), first=2, prior=0.5))


def ran_in_pieces(model, ids, piece):
    """Return which layers ran, [L, B, T], reading ``piece`` tokens at once."""
    cache, parts = model.new_cache(), []
    for block in ids.split(piece, dim=1):
        model(block, past_key_values=cache)
        parts.append(model.last_trace.ran)
    return torch.cat(parts, dim=2)


def test_a_controller_with_the_formula_of_a_gate_has_its_ties():
    weights = torch.ones(LAYERS, WIDTH), *(torch.ones(LAYERS) for _ in range(2))
    formula = LinearGate(*weights, spread=torch.tensor([1.0, 2.0, 3.0]), prior=1.0, window=8)
    controller = StaticController()
    assert controller.tie(1) == 0
    named = type("Formula", (StaticController,), {"linear": formula})
    assert named().tie(1) == pytest.approx(2 * TIE)


@torch.no_grad()
@pytest.mark.parametrize("fast", [False, True])
def test_repeated_tokens_are_decided_on_alike_in_blocks_of_any_size(network, fast):
    model = adaptive(network, gate(), 0.7, fast=fast)
    few = torch.randint(2, 97, (16, 4), generator=torch.Generator().manual_seed(2))
    for ids in (*few[:, :1].expand(-1, LENGTH).split(1), *few.repeat(1, LENGTH // 4)[:4].split(1)):
        whole = ran_in_pieces(model, ids, LENGTH)[0]
        for piece in (1, 7):
            assert torch.equal(ran_in_pieces(model, ids, piece)[0], whole)
