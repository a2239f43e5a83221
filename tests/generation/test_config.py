"""The model's generation config: it counts for texts as for token ids, and is saved as it stands."""

import pytest
import torch
from tiny import adaptive, build
from transformers import GenerationConfig

import anee
from anee_core.errors import InputError

PROMPT = "abcdef"


@pytest.fixture
def model(word_tokenizer):
    found = adaptive(build("llama"), "static:skip=1", tokenizer=word_tokenizer)
    found.generation_config = GenerationConfig(pad_token_id=0)
    return found


def by_ids(model, **options):
    ids = model.tokenizer([PROMPT], return_tensors="pt")["input_ids"]
    return model.generate(ids, **options)[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize(
    "setting",
    [{"max_length": 9}, {"max_new_tokens": 4}, {"max_length": 9, "max_new_tokens": 5}, {"max_time": 0.0}, {}],
)
def test_length_and_time_count_for_every_door(model, setting):
    for name, value in setting.items():
        setattr(model.generation_config, name, value)
    expected = by_ids(model)
    assert model.generate(PROMPT).new_tokens[0] == expected
    assert model.generate(PROMPT, min_new_tokens=1).new_tokens[0] == expected
    encoded = model.tokenizer([PROMPT], return_tensors="pt")["input_ids"]
    assert model.decode(encoded).new_tokens[0] == expected
    assert len(model.generate(PROMPT, max_new_tokens=2).new_tokens[0]) == (1 if "max_time" in setting else 2)


def test_stop_strings_count_too(model):
    stop = model.generate(PROMPT).completion[3]
    model.generation_config.stop_strings = [stop]
    found = model.generate(PROMPT)
    assert found.completion == found.completion[: found.completion.index(stop) + 1]
    assert found.new_tokens[0] == by_ids(model, tokenizer=model.tokenizer)


def test_a_prompt_that_fills_max_length_is_refused(model):
    model.generation_config.max_length = 6
    with pytest.raises(InputError, match="max_length is 6 and the prompt has 6 tokens: set max_new_tokens"):
        model.generate(PROMPT)


@pytest.mark.parametrize(
    "name", ["output_scores", "output_logits", "output_hidden_states", "output_attentions", "return_dict_in_generate"]
)
def test_what_a_generation_does_not_hold_is_refused(model, name):
    with pytest.raises(InputError, match=f"{name} is for token ids"):
        model.generate(PROMPT, **{name: True})
    model.generation_config.max_new_tokens = 2
    assert model.generate(PROMPT, **{name: False}).text
    with pytest.raises(InputError, match=f"{name} is for token ids"):
        model.generate(PROMPT, generation_config=GenerationConfig(**{name: True}))


def test_an_assigned_config_is_saved_and_loads_again(model, tmp_path):
    model.generation_config = GenerationConfig(max_new_tokens=7, pad_token_id=0)
    model.save_pretrained(tmp_path)
    again = anee.load(tmp_path, "static:skip=1", tokenizer=model.tokenizer)
    assert again.generation_config.max_new_tokens == 7
    assert again.generate(PROMPT).new_tokens == model.generate(PROMPT).new_tokens


def test_a_kind_of_cache_stays_in_the_checkpoint(tmp_path):
    network = build("llama")
    network.generation_config.cache_implementation = "hybrid"
    model = adaptive(network)
    model.generation_config.max_new_tokens = 3
    model.save_pretrained(tmp_path)
    saved = GenerationConfig.from_pretrained(tmp_path)
    assert (saved.cache_implementation, saved.max_new_tokens) == ("hybrid", 3)
    assert model.generation_config.cache_implementation is None


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("max_new_tokens", [0, -1, 1.5, "3", True, 10**20, float("nan")]),
        ("temperature", [0, -1.0, 1e-300, 1e30, float("nan"), float("inf"), "hot"]),
        ("top_k", [-1, 2.5, 10**20, True]),
        ("top_p", [0, -0.1, 1.1, float("nan"), 10**20]),
        ("repetition_penalty", [0, -1, 1e-300, 1e30, float("inf")]),
        ("seed", [-1, 2**64, 1.5, "x"]),
        ("eos_token_id", [-5, 1.5, "2", [3, "4"], [10**20]]),
        ("pad_token_id", [-5, 1.5, "2", [1]]),
        ("max_time", [-1, float("nan"), "1"]),
        ("do_sample", ["yes", 1]),
    ],
)
def test_numbers_of_decode_are_refused_by_their_name(model, option, values):
    ids = model.tokenizer([PROMPT], return_tensors="pt")["input_ids"]
    for value in values:
        options = {"do_sample": True, "max_new_tokens": 2, option: value}
        with pytest.raises(InputError, match=f"^{option} is "):
            model.decode(ids, **options)


@pytest.mark.parametrize(
    "extreme",
    [
        {"temperature": 1e-20},
        {"temperature": 1e20},
        {"top_p": 1e-300},
        {"repetition_penalty": 1e6},
        {"seed": 2**64 - 1},
    ],
)
def test_the_ends_of_the_ranges_work(model, extreme):
    ids = model.tokenizer([PROMPT], return_tensors="pt")["input_ids"]
    options = {"do_sample": True, "max_new_tokens": 3, "repetition_penalty": 1e-6, "temperature": 1e-20, **extreme}
    assert len(model.decode(ids, **options).new_tokens[0]) == 3


@torch.no_grad()
def test_what_draws_are_made_with_does_not_matter_without_any(model):
    model.generation_config.temperature = 0.0
    assert model.generate(PROMPT, max_new_tokens=2).text
