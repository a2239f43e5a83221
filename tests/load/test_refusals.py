"""What cannot be loaded is refused in words, before anything is read where that can be."""

import copy

import pytest
import torch
from torch import nn

import anee
from anee_core.errors import InputError, ModelError


@pytest.mark.parametrize("thing", [nn.Linear(2, 2), nn.Sequential()])
def test_other_modules_are_refused(thing):
    with pytest.raises(ModelError, match=f"a model is a transformers causal LM; got {type(thing).__name__}"):
        anee.load(thing)


def test_model_without_a_head_is_refused(tiny_llama, tiny_gpt2):
    for body in (tiny_llama.model, tiny_gpt2.transformer):
        with pytest.raises(anee.AneeError):
            anee.load(body)


@pytest.mark.parametrize("option", ["polcy", "attn_implementation", "revision"])
def test_option_that_a_loaded_model_cannot_take_is_refused(tiny_llama, option):
    with pytest.raises(InputError, match=f"unknown option '{option}'"):
        anee.load(tiny_llama, **{option: "static:skip=1"})


def test_misspelt_option_for_a_folder_is_refused(llama_folder):
    with pytest.raises(ModelError, match="polcy"):
        anee.load(llama_folder, polcy="static:skip=1")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "statik"}, "unknown policy 'statik'"),
        ({"budget": 2.0}, r"lies in \(0, 1\]"),
        ({"dtype": "bf16"}, r"unknown dtype 'bf16'; did you mean 'bfloat16'\?"),
        ({"dtype": torch.int8}, r"a model runs in a floating-point dtype; got torch\.int8"),
        ({"device": "toaster"}, "device 'toaster' cannot be used"),
        ({"device": torch.device("cuda", 99)}, "device 'cuda:99' cannot be used"),
    ],
)
def test_wrong_option_shows_before_anything_is_loaded(monkeypatch, llama_folder, options, message):
    def fail(*_, **__):
        raise AssertionError("no file is read for a call that cannot succeed")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", fail)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", fail)
    with pytest.raises(anee.AneeError, match=message) as caught:
        anee.load(llama_folder, **options)
    assert "\n" not in str(caught.value)


def test_weights_of_a_loaded_model_are_checked(tiny_llama):
    broken = copy.deepcopy(tiny_llama)
    broken.model.layers[1].mlp.up_proj.weight[3, 4] = float("inf")
    with pytest.raises(ModelError, match=r"weight 'model\.layers\.1\.mlp\.up_proj\.weight' holds NaN or infinity"):
        anee.load(broken)


def test_budget_that_cannot_be_met_shows_before_calibration(tiny_llama, monkeypatch):
    def fail(*_, **__):
        raise AssertionError("calibration may take minutes")

    monkeypatch.setattr("anee_core.load.calibrate", fail)
    with pytest.raises(anee.AneeError, match=r"a budget of 0\.2 cannot be met: the least possible is"):
        anee.load(tiny_llama, "heuristic:protect=1 1", 0.2)


def test_the_hub_gets_model_and_policy_each_by_itself(tiny_llama):
    with pytest.raises(InputError, match="anee publish"):
        anee.load(tiny_llama, "static:skip=1").push_to_hub("somebody/name")
