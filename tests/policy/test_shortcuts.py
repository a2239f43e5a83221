"""Shortcuts in the place of skipped layers: against the model with those layers replaced, and their cost."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from signed import sign
from tiny import FEW, adaptive, build, ragged, stepwise, tokens
from torch import nn

from anee_core.conformance.cost import expect_counted, spent_by_token
from anee_core.controllers.static import StaticController
from anee_core.errors import CheckpointError, PolicyError
from anee_core.interfaces.formulas import unit_norm
from anee_core.policy import LowRankShortcut, Policy, ShortcutWeights

CLOSE = {"atol": 5e-5, "rtol": 1e-3}
LAYERS, WIDTH, RANK = 6, 32, 4


def draw(folder, scale=1.0, layers=LAYERS, width=WIDTH):
    generator = torch.Generator().manual_seed(4)
    down, up = (
        torch.randn(layers, RANK, width, generator=generator),
        torch.randn(layers, width, RANK, generator=generator),
    )
    bias = torch.randn(layers, width, generator=generator)
    ShortcutWeights(down * 0.1, up * scale, bias * 0.1 * scale).save(folder)
    return folder


@pytest.fixture
def shortcuts(tmp_path):
    return draw(tmp_path / "shortcuts")


class Replaced(nn.Module):
    """What a skipped layer is: the hidden state, and the shortcut's estimate of the rest."""

    def __init__(self, weights, layer_idx):
        super().__init__()
        self.down, self.up, self.bias = (getattr(weights, name)[layer_idx] for name in ("down", "up", "bias"))

    def forward(self, hidden_states, *args, **kwargs):
        unit = hidden_states / hidden_states.square().mean(-1, keepdim=True).add(1e-6).sqrt()
        return hidden_states + (self.up @ (self.down @ unit[..., None]))[..., 0] + self.bias


def test_skipping_equals_the_model_with_the_layers_replaced(shortcuts):
    network, ids = build("llama"), tokens()
    model = adaptive(network, f"static:skip=2 3+shortcuts:{shortcuts}")
    with torch.no_grad():
        found = model(ids).logits
        weights = ShortcutWeights.load(shortcuts)
        for layer_idx in (2, 3):
            network.model.layers[layer_idx] = Replaced(weights, layer_idx)
        torch.testing.assert_close(found, network(ids, use_cache=False).logits, **CLOSE)


@pytest.mark.parametrize("family", FEW)
def test_parallel_equals_stepwise_and_rows_are_alone(family, shortcuts):
    model = adaptive(build(family), f"random:p=0.5,protect=0 0+shortcuts:{shortcuts}")
    ids = tokens(length=13)
    with torch.no_grad():
        whole = model(ids).logits
        torch.testing.assert_close(whole, stepwise(model, ids), **CLOSE)
        plain = adaptive(model.model, "random:p=0.5,protect=0 0")(ids).logits
        assert not torch.allclose(whole, plain, atol=1e-3)
        lengths = (13, 5, 9)
        rows, mask = ragged(lengths, "left")
        padded = model(rows, attention_mask=mask).logits
        for i, length in enumerate(lengths):
            torch.testing.assert_close(padded[i, -length:], model(rows[i : i + 1, -length:]).logits[0], **CLOSE)


def test_shortcuts_of_nothing_are_plain_skipping(tmp_path):
    draw(tmp_path / "zero", scale=0.0)
    network, ids = build("gpt2"), tokens()
    with torch.no_grad():
        found = adaptive(network, f"random:p=0.5+shortcuts:{tmp_path / 'zero'}")(ids).logits
        assert torch.equal(found, adaptive(network, "random:p=0.5")(ids).logits)


@pytest.mark.parametrize("policy", ["static:skip=1 4", "random:p=0.5,protect=0 0"])
def test_their_cost_is_counted_and_charged(policy, shortcuts):
    model = adaptive(build("llama"), f"{policy}+shortcuts:{shortcuts}")
    expect_counted(model, lambda: model(tokens()), "a sequence", "shortcuts")
    assert model.last_trace.flops["shortcuts"] > 0
    assert model.last_trace.weight_bytes["shortcuts"] > 0
    plain = adaptive(model.model, policy)
    plain(tokens())
    assert model.last_trace.budget_spent > plain.last_trace.budget_spent


def test_a_hard_budget_pays_for_them(shortcuts):
    model = adaptive(build("llama"), f"random:p=0.1,protect=0 0+shortcuts:{shortcuts}", 0.7, hard=True)
    assert spent_by_token(model, tokens(2, 20)).max() <= 0.7 + 1e-6


def test_unit_norm_keeps_dtype_and_direction():
    states = torch.randn(2, 3, 64) * 7
    unit = unit_norm(states)
    torch.testing.assert_close(unit.square().mean(-1), torch.ones(2, 3))
    torch.testing.assert_close(torch.nn.functional.cosine_similarity(unit, states, dim=-1), torch.ones(2, 3))
    assert unit_norm(states.bfloat16()).dtype == torch.bfloat16


def test_a_saved_policy_holds_them(shortcuts, tmp_path):
    model = adaptive(build("llama"), f"static:skip=2+shortcuts:{shortcuts}+window:sinks=1,recent=6")
    assert model.policy.spelled == f"static:skip=2+shortcuts:folder={shortcuts}+window:sinks=1,recent=6"
    with torch.no_grad():
        wanted = model(tokens()).logits
        model.policy.save(tmp_path / "saved")
        (shortcuts / "shortcuts.safetensors").unlink()
        again = adaptive(model.model, str(tmp_path / "saved"), calibration=None)
        assert torch.equal(again(tokens()).logits, wanted)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("random:p=0.3+shortcuts:no/such/folder", "is missing"),
        ("shortcuts:{folder}", "skips no layer"),
        ("dense+shortcuts:{folder}", "skips no layer"),
        ("static:skip=1+shortcuts:{folder}+shortcuts:{folder}", "two shortcuts"),
    ],
)
def test_wrong_policies_say_what_is_wrong(policy, message, shortcuts):
    with pytest.raises((PolicyError, CheckpointError), match=message):
        adaptive(build("llama"), policy.format(folder=shortcuts))


def test_weights_have_to_come_from_somewhere():
    model = adaptive(build("llama"))
    with pytest.raises(PolicyError, match="shortcuts: no weights are installed for this model"):
        model.set_policy(Policy(StaticController(skip=(1,)), shortcut=LowRankShortcut()))


def test_weights_of_another_model_are_refused(tmp_path):
    draw(tmp_path / "other", layers=4)
    with pytest.raises(PolicyError, match="for 4 layers of width 32, the model has 6 of 32"):
        adaptive(build("llama"), f"static:skip=1+shortcuts:{tmp_path / 'other'}")


@pytest.mark.parametrize("damage", ["header", "shape", "numbers"])
def test_damaged_weights_are_refused(damage, shortcuts):
    header, file = shortcuts / "shortcuts.json", shortcuts / "shortcuts.safetensors"
    known = load_file(file)
    if damage == "header":
        header.write_text(json.dumps({**json.loads(header.read_text()), "more": 1}))
    elif damage == "shape":
        save_file({**known, "bias": known["bias"][:3].contiguous()}, file)
    else:
        save_file({**known, "bias": known["bias"] * float("nan")}, file)
    sign(shortcuts, "shortcuts")
    with pytest.raises(CheckpointError, match="shortcuts in"):
        adaptive(build("llama"), f"static:skip=1+shortcuts:{shortcuts}")


def test_an_object_does_as_well(shortcuts):
    assert LowRankShortcut(str(shortcuts)).options() == {"folder": str(shortcuts)}
