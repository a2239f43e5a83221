"""What generate takes: texts, chats, token ids in their several forms."""

import numpy as np
import pytest
import torch
from tiny import FIVE, SEVEN, adaptive, build, shared, tokens
from transformers import GenerationConfig

from anee_core.errors import InputError

GREEDY = {"max_new_tokens": 5, "do_sample": False}
TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}{{ '[a]' if add_generation_prompt }}"
CHAT = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]


@pytest.fixture
def model(word_tokenizer):
    return adaptive(build("llama"), "static:skip=1", tokenizer=word_tokenizer)


def test_a_chat_goes_through_the_template(model, monkeypatch):
    with pytest.raises(InputError, match=r"no chat template: set tokenizer\.chat_template, or give the chat as text"):
        model.generate(CHAT)
    monkeypatch.setattr(model.tokenizer, "chat_template", TEMPLATE)
    written = "[system] be brief [user] hello [a]"
    expected = model.generate(written, max_new_tokens=5)
    alone = model.generate(CHAT, max_new_tokens=5)
    assert alone.text == expected.text
    assert alone.text.startswith(written)
    both = model.generate([CHAT, "abc"], max_new_tokens=5)
    assert both.texts == model.generate([written, "abc"], max_new_tokens=5).texts
    assert model.generate([CHAT, CHAT], max_new_tokens=5).texts == [expected.text] * 2


def test_token_ids_come_as_tensors_arrays_or_what_a_tokenizer_returns(model):
    encoded = model.tokenizer(["abc", "abcde"], return_tensors="pt", padding=True, padding_side="left")
    expected = model.generate(encoded["input_ids"], attention_mask=encoded["attention_mask"], **GREEDY)
    assert torch.equal(model.generate(encoded, **GREEDY), expected)
    assert torch.equal(model.generate(**encoded, **GREEDY), expected)
    ids = tokens(2, 6)
    expected = model.generate(ids, **GREEDY)
    assert torch.equal(model.generate(ids.numpy(), **GREEDY), expected)
    assert torch.equal(model.generate(input_ids=ids, **GREEDY), expected)


@pytest.mark.parametrize("given", [torch.tensor([5, 6, 7]), np.array([5, 6, 7])])
def test_a_single_row_without_a_batch_is_refused(model, given):
    with pytest.raises(InputError, match=r"token ids are \[batch, tokens\], so \[1, tokens\] for one row; got \(3,\)"):
        model.generate(given)


@pytest.mark.parametrize("given", [[5, 6], [], [["a"]], [{"role": "user"}], ["a", 3]])
def test_other_lists_are_refused(model, given):
    with pytest.raises(InputError, match="prompts are a string, a chat"):
        model.generate(given)
    with pytest.raises(InputError, match="got object"):
        model.generate(object())


def test_switches_of_the_config_count():
    model, ids = adaptive(build("llama", "eager")), tokens(2, 6)
    assert model(ids).hidden_states is None
    model.config.output_hidden_states = True
    assert len(model(ids).hidden_states) == 7
    assert model(ids, output_hidden_states=False).hidden_states is None
    model.config.output_hidden_states = False
    model.config.use_cache = False
    assert model(ids).past_key_values is None
    model.config.output_attentions = True
    with pytest.raises(InputError, match=r"cannot be returned: set config\.output_attentions to False"):
        model(ids)
    model.config.output_attentions = False
    with pytest.raises(InputError, match="output_hidden_states is True, for those of all layers, or False"):
        model(ids, output_hidden_states=[0, 2])


@pytest.mark.parametrize("policy", FIVE)
@pytest.mark.parametrize("family", SEVEN)
@torch.no_grad()
def test_fewer_logits_are_the_same_ones(family, policy):
    model, ids = adaptive(shared(family), policy), tokens(2, 9)
    whole = model(ids).logits
    for asked, columns in ((0, slice(None)), (1, slice(-1, None)), (3, slice(-3, None))):
        torch.testing.assert_close(model(ids, logits_to_keep=asked).logits, whole[:, columns])
    places = torch.tensor([0, 4, 8])
    torch.testing.assert_close(model(ids, logits_to_keep=places).logits, whole[:, places])


@pytest.mark.parametrize("policy", FIVE)
@pytest.mark.parametrize("family", SEVEN)
def test_generating_without_a_cache_is_the_same_however_that_is_said(family, policy):
    model, ids = adaptive(build(family), policy), tokens(2, 6)
    expected = model.generate(ids, **GREEDY)
    assert torch.equal(model.generate(ids, use_cache=False, **GREEDY), expected)
    without = GenerationConfig(use_cache=False, **GREEDY)
    assert torch.equal(model.generate(ids, generation_config=without), expected)
    model.generation_config = GenerationConfig(use_cache=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(model.generate(ids, **GREEDY), expected)
    assert torch.equal(model.generate(ids, generation_config=GenerationConfig(**GREEDY)), expected)
    assert torch.equal(model.generate(ids, use_cache=True, **GREEDY), expected)


@pytest.mark.parametrize("policy", FIVE)
@pytest.mark.parametrize("family", SEVEN)
@torch.no_grad()
def test_hidden_states_are_those_of_the_layers(family, policy):
    network, ids = shared(family), tokens(2, 6)
    model = adaptive(network, policy, fast=False)
    states = model(ids, output_hidden_states=True).hidden_states
    assert len(states) == network.config.num_hidden_layers + 1
    assert all(each.shape == states[0].shape for each in states)
    if policy == "dense":
        for mine, other in zip(states, network(ids, output_hidden_states=True).hidden_states, strict=True):
            torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("cache_implementation", [None, "hybrid"])
def test_an_assigned_generation_config_is_used_and_saved(cache_implementation, tmp_path):
    model = adaptive(build("llama"))
    model.generation_config = GenerationConfig(
        max_new_tokens=3, pad_token_id=0, cache_implementation=cache_implementation
    )
    assert model.generate(tokens(1, 4)).shape == (1, 7)
    model.save_pretrained(tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path).max_new_tokens == 3
