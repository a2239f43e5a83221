"""The gate: its decisions by hand, its promises on small models, its weights on disk."""

import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from signed import sign
from tiny import FEW, adaptive, build, gate_weights, ragged, stepwise, tokens

from anee_core.calibration.shares import from_one_score
from anee_core.controllers.gate import GateController, GateWeights
from anee_core.errors import BudgetError, CheckpointError, PolicyError
from anee_core.interfaces import Setting
from anee_core.policy import Policy

CLOSE = {"atol": 5e-5, "rtol": 1e-3}


def draw(folder, layers=6, width=32):
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(layers, width, generator=generator) * width**-0.5
    shares = torch.stack([torch.full((layers,), share) for share in (0.9, 0.5, 0.0)])
    GateWeights(
        weight, torch.zeros(layers), torch.zeros(layers), torch.ones(layers), torch.tensor([0.4, 0.7, 1.0]), shares
    ).save(folder)
    return folder


@pytest.fixture
def gate(tmp_path):
    return draw(tmp_path / "gate")


@pytest.mark.parametrize("family", FEW)
def test_parallel_equals_stepwise_and_rows_are_alone(family, gate):
    model = adaptive(build(family), f"gate:{gate},prior=4", 0.7)
    lengths = (19, 6, 11)
    rows, mask = ragged(lengths, "left")
    with torch.no_grad():
        padded = model(rows, attention_mask=mask).logits
        torch.testing.assert_close(padded[0], stepwise(model, rows[:1], mask[:1])[0], **CLOSE)
        for i, length in enumerate(lengths):
            torch.testing.assert_close(padded[i, -length:], model(rows[i : i + 1, -length:]).logits[0], **CLOSE)


@pytest.mark.parametrize("window", [256, 3])
def test_decisions_follow_from_ranks_among_earlier_tokens(window, gate):
    policy, ids = f"gate:{gate},prior=4,first=2,window={window},protect=1 1", tokens(2, 15)
    model, weights = adaptive(build("llama"), policy, 0.7), GateWeights.load(gate)
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states
    ran = model.last_trace.ran
    assert ran[0].all()
    assert ran[-1].all()
    assert ran[:, :, :2].all()
    assert not ran.all()
    for layer_idx in range(1, 5):
        for row in range(2):
            unit = states[layer_idx][row] / states[layer_idx][row].square().mean(-1, keepdim=True).sqrt()
            scores = unit @ weights.weight[layer_idx]
            for t in range(2, 15):
                earlier = scores[max(2, t - window) : t]
                below = 0.5 * (1 + math.erf(float(scores[t]) / math.sqrt(2)))
                rank = (int((earlier < scores[t]).sum()) + 4 * below) / (len(earlier) + 4)
                # Between 0.9 at 0.4 and 0.5 at 0.7: two tokens ran everything, and 32 pay for what they spent.
                # Attention is saved too.
                costs = model.engine.costs
                more = (1 - costs.token_shares(torch.tensor(t))[1].sum()) / (1 - sum(costs.skip_shares))
                allowed = 1 - (0.3 + 2 * 0.3 / 32) / more
                share = 0.5 + 0.4 * (0.7 - allowed) / 0.3
                assert ran[layer_idx, row, t] == (rank >= share) or abs(rank - share) < 1e-4


def test_the_budget_chooses_the_shares(gate):
    spent = []
    for budget in (0.4, 0.55, 0.7, 0.85, 1.0):
        model = adaptive(build("llama"), f"gate:{gate},protect=0 0", budget)
        model(tokens(2, 24))
        spent.append(model.last_trace.budget_spent)
    assert spent == sorted(spent)
    assert spent[0] < spent[2] < spent[4] == 1
    weights = GateWeights.load(gate)
    torch.testing.assert_close(weights.shares_at(torch.tensor(0.55)), torch.full((6,), 0.7))
    assert torch.equal(weights.shares_at(torch.tensor(1.0)), weights.shares[-1])


def test_what_the_first_tokens_spend_is_paid_back():
    gate, model = GateController(first=4), adaptive(build("llama"))
    costs = replace(model.engine.costs, pair_flops=0)
    allowed = gate.allowed(torch.tensor(0.7), torch.arange(4, 60), costs)
    assert (4 + allowed[:32].sum()) / 36 == pytest.approx(0.7)
    torch.testing.assert_close(allowed[32:], torch.full((24,), 0.7))
    assert gate.settled == 36
    first = GateController(first=0).allowed(torch.tensor(0.7), torch.arange(60), costs)
    torch.testing.assert_close(first, torch.full((60,), 0.7))


@pytest.mark.parametrize("budget", [0.6, 0.75, 0.9])
def test_shares_spend_the_budget_however_much_attention_costs(budget):
    costs = adaptive(build("llama")).engine.costs
    weights = from_one_score(gate_weights()[0], costs, frozenset())
    setting = Setting(costs, budget, width=32)
    bound = GateController.of(weights, first=2, protect=(0, 0)).bind(setting)
    positions = torch.tensor([40, 164, 1000, 5000, 50_000, 131_000])
    shares = bound.shares(positions[None])[0]
    run, skip = costs.token_shares(positions)
    spent = (run.T * (1 - shares) + skip.T * shares).sum(1)
    torch.testing.assert_close(spent, torch.full((6,), budget), atol=2e-3, rtol=0)
    assert shares[-1].sum() < 0.97 * shares[0].sum()


def test_a_hard_budget_holds_for_every_token(gate):
    model = adaptive(build("llama"), f"gate:{gate}", 0.7, hard=True)
    model(tokens(2, 24))
    run, skip = model.engine.costs.token_shares(torch.arange(24).expand(2, -1))
    spent = torch.where(model.last_trace.ran, run, skip).sum(0)
    assert spent.max() <= 0.7 + 1e-6


@pytest.mark.parametrize(
    ("policy", "budget", "message"),
    [
        ("gate:no/such/folder", None, "is missing"),
        ("gate:{folder},prior=0", None, "prior is a number, at least 1e-30"),
        ("gate:{folder},first=-1", None, "first is a whole number, at least 0"),
        ("gate:{folder},window=0", None, "window is a whole number, at least 1"),
        ("gate:{folder},protect=0 0", 0.39, "below the least that it was fitted for, 0.400"),
        ("gate:{folder}", 0.05, "the least possible is"),
    ],
)
def test_wrong_options_say_what_is_wrong(policy, budget, message, gate):
    with pytest.raises((PolicyError, CheckpointError, BudgetError), match=message):
        adaptive(build("llama"), policy.format(folder=gate), budget)


def test_weights_have_to_come_from_somewhere():
    model = adaptive(build("llama"))
    with pytest.raises(PolicyError, match="gate: no weights are installed for this model"):
        model.set_policy(Policy(GateController()))


def test_weights_of_another_model_are_refused(tmp_path):
    draw(tmp_path / "other", width=16)
    with pytest.raises(PolicyError, match="6 layers of width 16, the model has 6 of 32"):
        adaptive(build("llama"), f"gate:{tmp_path / 'other'}")


@pytest.mark.parametrize("damage", ["header", "shape", "spread", "order", "shares"])
def test_damaged_weights_are_refused(damage, gate):
    header, file = gate / "gate.json", gate / "gate.safetensors"
    known = load_file(file)
    if damage == "header":
        header.write_text(json.dumps({**json.loads(header.read_text()), "more": 1}))
    else:
        changed = {"shape": ("bias", known["bias"][:3]), "spread": ("spread", known["spread"] * 0)}
        changed["shares"] = ("shares", known["shares"] + 0.2)
        name, tensor = changed.get(damage, ("budgets", known["budgets"].flip(0)))
        save_file({**known, name: tensor.contiguous()}, file)
    sign(gate, "gate")
    with pytest.raises(CheckpointError, match="gate in"):
        adaptive(build("llama"), f"gate:{gate}")


def test_weights_round_trip(gate, tmp_path):
    weights = replace(GateWeights.load(gate), facts={"text": "some"})
    weights.save(tmp_path / "again")
    again = GateWeights.load(tmp_path / "again")
    assert again.facts == {"text": "some"}
    assert torch.equal(again.shares, weights.shares)
