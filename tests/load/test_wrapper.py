"""`ANEEWrapper`, the front door of the first system."""

import copy
import re

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import anee
from anee import ANEEConfig
from anee.wrapper import ANEEWrapper


@pytest.fixture(scope="module")
def deep_folder(tmp_path_factory, tiny_llama, word_tokenizer):
    """A model with eight layers: the default policy protects four."""
    config = copy.deepcopy(tiny_llama.config)
    config.num_hidden_layers = 8
    torch.manual_seed(2)
    folder = tmp_path_factory.mktemp("deep")
    type(tiny_llama)(config).save_pretrained(folder)
    word_tokenizer.save_pretrained(folder)
    return folder


def test_wrapper_generates_text_under_a_given_policy(llama_folder, word_tokenizer):
    config = ANEEConfig(model_name=str(llama_folder), energy_budget=0.8, policy="static:skip=1")
    wrapper = ANEEWrapper(config).eval()
    text = wrapper.generate(tokenizer=word_tokenizer, prompt="Hello", max_new_tokens=6)
    assert text == anee.load(llama_folder, "static:skip=1").generate("Hello", max_new_tokens=6).text
    assert wrapper.model.last_trace.layers_run == 0.75
    assert wrapper.config is config


def test_wrapper_generates_text_under_the_default_policy_and_meets_the_budget(deep_folder):
    wrapper = ANEEWrapper(ANEEConfig(model_name=str(deep_folder), energy_budget=0.7)).eval()
    text = wrapper.generate(prompt="Hello", max_new_tokens=30)
    assert text.startswith("Hello")
    assert str(wrapper.model.policy) == "heuristic"
    assert wrapper.model.budget == 0.7
    assert wrapper.model.last_trace.budget_spent == pytest.approx(0.7, abs=0.03)


def test_wrapper_passes_device_dtype_and_generation_options_on(llama_folder):
    config = ANEEConfig(model_name=str(llama_folder), policy="dense", energy_budget=1.0, dtype="bfloat16", device="cpu")
    wrapper = ANEEWrapper(config)
    assert wrapper.model.dtype == torch.bfloat16
    options = {"do_sample": True, "top_k": 40, "max_new_tokens": 12}
    assert wrapper.generate("Hello", seed=1, **options) == wrapper.generate("Hello", seed=1, **options)
    assert wrapper.generate("Hello", seed=1, **options) != wrapper.generate("Hello", seed=2, **options)


def test_the_first_system_s_own_lines_run_as_they_stand(tmp_path, word_tokenizer, caplog):
    """On GPT-2 XL's 48 layers, of which the default policy protects four, a budget of 0.2 is below the least."""
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=16, n_layer=48, n_head=2, n_positions=64)).save_pretrained(
        tmp_path
    )
    config = ANEEConfig(model_name=str(tmp_path), energy_budget=0.2)
    model = ANEEWrapper(config).eval()
    with caplog.at_level("WARNING"):
        texts = [model.generate(tokenizer=word_tokenizer, prompt="The future of AI", max_new_tokens=30) for _ in "ab"]
    assert texts[0] == texts[1]
    assert texts[0].startswith("The future of AI")
    spent = model.model.last_trace.budget_spent
    said = [r.getMessage() for r in caplog.records if "energy_budget" in r.getMessage()]
    assert len(said) == 1
    assert re.search(r"energy_budget=0\.2 cannot be met .* least possible is 0\.23\d, and 0\.\d+ was spent", said[0])
    assert spent == pytest.approx(model.model.budget, abs=0.01)
    with pytest.raises(anee.AneeError, match=r"a budget of 0\.2 cannot be met: the least possible is"):
        anee.load(str(tmp_path), "heuristic", 0.2)


def test_wrapper_refuses_what_is_no_budget(llama_folder):
    with pytest.raises(anee.AneeError, match="lies in"):
        ANEEWrapper(ANEEConfig(model_name=str(llama_folder), energy_budget=0.0))
