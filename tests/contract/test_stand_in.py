"""A model passes for the one that it holds: for its class, and for its weights by their names."""

import copy
import pickle

import peft
import pytest
import torch
from tiny import FIVE, SEVEN, adaptive, build, shared, tokens
from transformers import PreTrainedModel, pipeline
from transformers.utils import logging as transformers_logging

import anee
from anee_core.errors import InputError
from anee_core.model import AdaptiveModel

LORA = {"task_type": "CAUSAL_LM", "target_modules": "all-linear", "init_lora_weights": False}


@pytest.mark.parametrize("family", SEVEN)
def test_it_is_of_both_classes(family):
    network = shared(family)
    model = adaptive(network)
    assert isinstance(model, (AdaptiveModel, PreTrainedModel))
    assert isinstance(model, AdaptiveModel)
    assert isinstance(model, type(network))
    assert not isinstance(model, peft.PeftModel)
    assert {"set_policy", "gradient_checkpointing_enable"} <= set(dir(model))
    assert repr(adaptive(network, "static:skip=1")).startswith(f"{type(network).__name__}(\n  under 'static:skip=1'\n")


def test_around_an_adapted_model_it_is_one():
    model = adaptive(peft.get_peft_model(build("llama"), peft.LoraConfig(**LORA)))
    assert isinstance(model, peft.PeftModel)
    assert isinstance(model, AdaptiveModel)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@torch.no_grad()
def test_it_is_copied_and_pickled(copied):
    model = adaptive(build("llama"), "static:skip=1")
    other = copied(model)
    assert type(other) is AdaptiveModel
    assert torch.equal(other(tokens()).logits, model(tokens()).logits)


@pytest.mark.parametrize("family", SEVEN)
@torch.no_grad()
def test_its_weights_go_by_the_names_they_have_in_the_model(family):
    network, other = shared(family), build(family)
    for parameter in other.parameters():
        parameter.mul_(1.25)
    model = adaptive(build(family))
    assert model.state_dict().keys() == network.state_dict().keys()
    assert not model.load_state_dict(other.state_dict()).missing_keys
    assert torch.equal(model(tokens()).logits, adaptive(other)(tokens()).logits)


def test_it_is_not_loaded_twice():
    model = adaptive(build("llama"), "static:skip=1")
    for given in (model, peft.get_peft_model(model, peft.LoraConfig(**LORA))):
        with pytest.raises(InputError, match=r"runs under 'static:skip=1' already: load the one it holds, model.model"):
            anee.load(given, "dense")


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("policy", FIVE)
def test_a_pipeline_takes_it_without_a_false_alarm(policy, adapted, tiny_llama, word_tokenizer, caplog):
    network = copy.deepcopy(tiny_llama)
    if adapted:
        network = peft.get_peft_model(network, peft.LoraConfig(**LORA))
    model = anee.load(network, policy, tokenizer=word_tokenizer)
    transformers_logging.enable_propagation()
    try:
        pipe = pipeline("text-generation", model=model, tokenizer=word_tokenizer)
    finally:
        transformers_logging.disable_propagation()
    assert "not supported" not in caplog.text
    found = pipe("the cat", max_new_tokens=4, do_sample=False)[0]["generated_text"]
    assert found == model.generate("the cat", max_new_tokens=4).text
