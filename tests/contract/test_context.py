"""Rows beyond a model's context: one rule for every way in."""

import pytest
import torch
from tiny import adaptive, shared, tokens
from transformers import TextStreamer

from anee_core.errors import InputError

CONTEXT = 128
PROMPT, NEW = 120, 20


def through_text(model):
    return model.generate("x" * PROMPT, max_new_tokens=NEW).sequences


def through_text_and_transformers(model):
    return model.generate("x" * PROMPT, max_new_tokens=NEW, min_new_tokens=NEW).sequences


def through_ids(model):
    return model.generate(tokens(1, PROMPT), max_new_tokens=NEW, do_sample=False)


def through_decode(model):
    return model.decode(tokens(1, PROMPT), max_new_tokens=NEW).sequences


def through_a_streamer(model):
    streamer = TextStreamer(model.tokenizer)
    return model.generate("x" * PROMPT, max_new_tokens=NEW, streamer=streamer).sequences


def through_one_forward(model):
    return model(tokens(1, PROMPT + NEW)).logits


def through_forwards(model):
    cache = model.new_cache()
    blocks = tokens(1, PROMPT + NEW).split([PROMPT, *[1] * NEW], dim=1)
    return torch.cat([model(block, past_key_values=cache).logits for block in blocks], dim=1)


def through_positions(model):
    return model(tokens(1, 4), position_ids=torch.arange(PROMPT + NEW - 4, PROMPT + NEW)[None]).logits


DOORS = [
    through_text, through_text_and_transformers, through_ids, through_decode, through_a_streamer, through_one_forward,
    through_forwards, through_positions,
]  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("policy", ["dense", "window:sinks=2,recent=16"])
def test_a_table_of_positions_is_a_limit_and_rotary_ones_are_not(policy, door, word_tokenizer, caplog):
    limited = adaptive(shared("gpt2"), policy, tokenizer=word_tokenizer)
    with pytest.raises(InputError, match=r"^position 1\d\d lies beyond the model's context of 128 tokens: shorten"):
        door(limited)
    assert limited.generate(tokens(1, CONTEXT - 4), max_new_tokens=5, do_sample=False).shape == (1, CONTEXT + 1)
    free = adaptive(shared("llama"), policy, tokenizer=word_tokenizer)
    caplog.clear()
    for _ in range(2):
        assert door(free).shape[1] in (PROMPT + NEW, 4)
    said = [record.getMessage() for record in caplog.records if "has gone beyond" in record.getMessage()]
    assert len(said) == 1
    assert "the context of 128 tokens that the model was trained for" in said[0]


@torch.no_grad()
def test_all_doors_go_on_alike():
    model = adaptive(shared("llama"), "window:sinks=2,recent=16")
    whole = through_ids(model)
    assert torch.equal(through_decode(model), whole)
    at_once = model(whole[:, :-1]).logits[:, PROMPT - 1 :].argmax(-1)
    assert torch.equal(at_once, whole[:, PROMPT:])


@torch.no_grad()
def test_padding_takes_no_positions():
    model, ids = adaptive(shared("gpt2")), tokens(1, 20)
    padded = torch.cat((torch.zeros(1, CONTEXT, dtype=torch.long), ids), dim=1)
    mask = (padded > 0).long()
    torch.testing.assert_close(model(padded, attention_mask=mask).logits[:, CONTEXT:], model(ids).logits)
    found = model.decode(padded, mask, max_new_tokens=10).new_tokens
    assert found == model.decode(ids, max_new_tokens=10).new_tokens


def test_room_for_new_tokens_grows(monkeypatch):
    monkeypatch.setattr("anee_core.generation.rows._AT_ONCE", 3)
    model, ids = adaptive(shared("llama")), tokens(2, 5)
    result = model.decode(ids, max_new_tokens=23)
    assert torch.equal(result.sequences, model.generate(ids, max_new_tokens=23, do_sample=False))
    assert not result.sequences.is_inference()


@pytest.mark.parametrize("new", [2**31 - 1, 10**8])
def test_more_new_tokens_than_fit_in_memory_may_be_asked_for(new):
    model, ids = adaptive(shared("llama")), tokens(1, 5)
    first = model.decode(ids, max_new_tokens=4).new_tokens[0]
    result = model.decode(ids, max_new_tokens=new, eos_token_id=first[-1])
    assert result.new_tokens[0] == first[: first.index(first[-1]) + 1]
