"""What is moved, converted, copied or set otherwise after loading, and what is given in unusual shapes."""

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from tiny import adaptive, build, gate_weights, tokens

import anee
from anee_core.errors import InputError, ModelError, PolicyError
from anee_core.interfaces import Action, Controller
from anee_core.policy import LowRankShortcut, Policy
from anee_core.steps.calls import LayerInput
from anee_core.steps.deferred import DeferredStep
from anee_core.steps.graphs.graph_step import GraphStep
from anee_core.steps.native.step import NativeStep

CLOSE = {"atol": 2e-5, "rtol": 1e-4}


@dataclass(frozen=True)
class Turned(Controller):
    """Decides in memory that lies layers last."""

    name: ClassVar[str] = "turned"

    def decide(self, signals, context):
        batch, count = context.position_ids.shape
        layers = torch.arange(context.layer_idx, context.num_layers)
        skips = (layers + context.position_ids[..., None]) % 3 == 0
        assert skips.shape == (batch, count, len(layers))
        return torch.where(skips, int(Action.SKIP), int(Action.PROCESS)).to(torch.uint8).permute(2, 0, 1)


@pytest.mark.parametrize("policy", [Policy(Turned()), "random:p=0.4,protect=0 0"])
def test_numbers_may_lie_in_any_order_in_memory(policy):
    network, ids = build("llama"), tokens(3, 7)
    positions = torch.arange(7).expand(3, -1).T.contiguous().T
    with torch.no_grad():
        fast, plain = (adaptive(network, policy, fast=fast)(ids, position_ids=positions) for fast in (True, False))
    torch.testing.assert_close(fast.logits, plain.logits, **CLOSE)


@pytest.mark.parametrize("fast", [True, False])
def test_attention_may_be_changed_after_loading(fast):
    network, ids = build("llama", "sdpa"), tokens()
    model = adaptive(network, fast=fast)
    with torch.no_grad():
        before = model(ids).logits
        model.set_attn_implementation("eager")
        torch.testing.assert_close(model(ids).logits, before, **CLOSE)
        model.config._attn_implementation = "flash_attention_2"
        with pytest.raises(ModelError, match="cannot express per-token masks"):
            model(ids)


def test_attention_that_has_no_soft_cap_is_computed_without():
    """PyTorch's has none, and some versions of transformers let Gemma 2 attend by it."""
    network, ids = build("gemma2", "eager"), tokens()
    uncapped = copy.deepcopy(network)
    for layer in uncapped.model.layers:
        layer.self_attn.attn_logit_softcapping = None
    uncapped.config.attn_logit_softcapping = None
    model = adaptive(network)
    with torch.no_grad():
        capped, wanted = model(ids).logits, adaptive(uncapped, fast=False)(ids).logits
        assert (capped - wanted).abs().max() > 1e-3
        network.config._attn_implementation = "sdpa"
        torch.testing.assert_close(model(ids).logits, wanted, **CLOSE)
        network.config._attn_implementation = "eager"
        assert torch.equal(model(ids).logits, capped)


def test_a_policy_follows_where_its_model_goes():
    _, shortcuts = gate_weights()
    policy = Policy(Turned(), shortcut=LowRankShortcut.of(shortcuts))
    network, ids = build("llama"), tokens()
    model = adaptive(network, policy, 0.9, hard=True)
    with torch.no_grad():
        model(ids)
        model.to(torch.bfloat16)
        assert model.engine.policy.shortcut.weights.down.dtype == torch.bfloat16
        assert (model.budget, model.engine.budget.hard) == (0.9, True)
        wanted = adaptive(copy.deepcopy(network), policy, 0.9, hard=True)(ids).logits
        assert torch.equal(model(ids).logits, wanted)
        # The wrapped model by itself is converted behind the policy's back.
        model.model.float()
        assert model(ids).logits.dtype == torch.float32


def deferring(model):
    return DeferredStep(NativeStep(model.adapter, model.parts))


def capturing(model):
    return GraphStep(deferring(model), model.adapter, model.parts)


@pytest.mark.parametrize("step", [None, deferring, capturing])
def test_a_copy_runs_by_itself(step):
    model, ids = adaptive(build("llama"), "random:p=0.4,protect=0 0"), tokens()
    if step is not None:
        model.use_step(step(model))
    with torch.no_grad():
        model.decode(ids, max_new_tokens=2)
        before = model(ids).logits
        other = copy.deepcopy(model)
        for parameter in model.parameters():
            parameter.zero_()
        assert torch.equal(other(ids).logits, before)
        assert other.slow_because == model.slow_because


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_quantised_weights_are_not_saved_as_if_they_were_plain(weights, tmp_path):
    model = anee.load(build("llama"), weights=weights)
    with pytest.raises(InputError, match="load it without weights"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    model.model.save_pretrained(tmp_path / "model")
    with pytest.raises(ModelError, match=r"quantised weights|cannot be loaded"):
        anee.load(tmp_path / "model")


def test_unset_arguments_may_be_tensors_no_more_than_anything_else():
    model = adaptive(build("llama"))
    model(tokens(), token_type_ids=None, output_attentions=False)
    with pytest.raises(InputError, match="takes no 'token_type_ids'"):
        model(tokens(), token_type_ids=torch.zeros(2, 11))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"input_ids": tokens().float()}, "whole numbers"),
        ({"inputs_embeds": torch.zeros(2, 3, 33)}, r"inputs_embeds is \[batch, tokens, 32\]"),
        ({"input_ids": tokens(), "logits_to_keep": -2}, "number of last positions"),
    ],
)
def test_wrong_input_is_refused(given, message):
    with pytest.raises(InputError, match=message):
        adaptive(build("llama"))(**given)


def test_ids_of_later_turns_are_checked_too():
    model = adaptive(build("llama"))
    cache = model(tokens(), use_cache=True).past_key_values
    with pytest.raises(InputError, match="token id 97 is not in the vocabulary"):
        model(torch.full((2, 3), 97), past_key_values=cache)


def test_a_first_forward_that_fails_leaves_room_for_another_batch(monkeypatch):
    model = adaptive(build("llama"), "heuristic:protect=1 1", 0.7)
    cache = model.new_cache()
    with monkeypatch.context() as broken:
        broken.setattr(model.engine.step, "norm", lambda states: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(tokens(2, 5), past_key_values=cache)
    again = model(tokens(1, 5), past_key_values=cache).logits
    torch.testing.assert_close(again, model(tokens(1, 5)).logits)


def test_debts_that_could_not_be_paid_are_still_owed():
    model = adaptive(build("llama"), "random:p=0.5,protect=0 0", fast=False)
    ids, cache, whole = tokens(1, 9), model.new_cache(), model.new_cache()
    owed = []

    def settle(into, layer_idx, states, call, slots):
        owed.append(layer_idx)
        if len(owed) == 1:
            raise KeyboardInterrupt
        model.engine.step.settle(LayerInput(layer_idx, states, call, into), slots)

    with torch.no_grad():
        for each in (cache, whole):
            model(ids[:, :-1], past_key_values=each)
        hidden = model.model.model.embed_tokens(ids[:, -1:])
        position = torch.tensor([[8]])
        calls = model.adapter.begin(model.parts, hidden, position)
        for each in (cache, whole):
            each.begin(position, None)
        cache.settle_with = settle
        cache.owe(1, hidden, calls[1])
        with pytest.raises(KeyboardInterrupt):
            cache.settle(1)
        cache.settle(1)
        model.engine.step.propagate(LayerInput(1, hidden, calls[1], whole))
        for mine, other in zip(cache.keys_values(1), whole.keys_values(1), strict=True):
            assert torch.equal(mine, other)
    assert owed == [1, 1]


def test_places_of_few_shapes_are_kept():
    model = adaptive(build("llama"))
    with torch.no_grad():
        for length in range(1, 101):
            model(tokens(1, length))
    step = model.engine.step
    assert isinstance(step, NativeStep)
    assert len(step._own.whole) <= 64


@pytest.mark.parametrize("name", ["a+b", "rate=3", "one,two", "x+y=1,z"])
def test_folders_may_have_any_name(name, tmp_path):
    gate, shortcuts = gate_weights()
    folder = tmp_path / name
    gate.save(folder)
    shortcuts.save(folder)
    model = adaptive(build("llama"), f"gate:{folder}+shortcuts:{folder}+window:sinks=1,recent=4", 0.9)
    assert (model.policy.controller.folder, model.policy.shortcut.folder) == (str(folder), str(folder))
    with pytest.raises(PolicyError, match="unknown policy 'windw'"):
        adaptive(build("llama"), f"gate:{folder}+windw", 0.9)
