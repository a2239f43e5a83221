"""Texts go on where their prompts end, and rows end where they ended, whatever ended them."""

import pytest
import torch
from tiny import adaptive, build
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, StoppingCriteria

WORDS = ["the", "capital", "of", "France", "is", "Paris", "and", "so", "on"]
PROMPTS = ["the capital of", "France is Paris and so"]


def pieces():
    """Return a tokenizer like LLaMA's: its decoder strips the space in front of the first token it is given."""
    words = [*WORDS, *(f"w{i:02}" for i in range(97 - 2 - len(WORDS)))]
    vocabulary = {"<unk>": 0, "</s>": 1, **{f"\u2581{word}": i for i, word in enumerate(words, 2)}}
    raw = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    raw.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", eos_token="</s>", pad_token="</s>")


@pytest.fixture(scope="module")
def model():
    found = adaptive(build("llama"), "static:skip=1", tokenizer=pieces())
    found.generation_config.eos_token_id = 1
    return found


@pytest.mark.parametrize("way", [{}, {"num_beams": 2}, {"no_repeat_ngram_size": 50}, {"min_new_tokens": 1}])
def test_the_space_behind_a_prompt_stays(model, way):
    result = model.generate(PROMPTS, max_new_tokens=4, **way)
    for row, prompt in enumerate(PROMPTS):
        whole = model.tokenizer.decode(result.sequences[row], skip_special_tokens=True)
        assert result.texts[row] == whole
        assert result.completions[row] == whole.removeprefix(prompt)
        assert result.completions[row].startswith(" ")


class After(StoppingCriteria):
    """End a row with a token."""

    def __init__(self, token):
        self.token = token

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -1] == self.token


def test_rows_end_where_they_ended_whatever_ended_them(model):
    plain = model.generate(PROMPTS, max_new_tokens=8, no_repeat_ngram_size=1)
    token = plain.new_tokens[0][2]
    expected = [row[: row.index(token) + 1] if token in row else row for row in plain.new_tokens]
    assert [len(row) for row in expected] == [3, 2]
    assert len(plain.new_tokens[0]) == 8
    ways = {
        "its end of sequence": {"eos_token_id": token},
        "a list of them": {"eos_token_id": [95, token]},
        "its own padding": {"eos_token_id": token, "pad_token_id": 6},
        "a criterion": {"stopping_criteria": [After(token)]},
        "a criterion, and its own padding": {"stopping_criteria": [After(token)], "pad_token_id": 6},
    }
    for name, way in ways.items():
        found = model.generate(PROMPTS, max_new_tokens=8, no_repeat_ngram_size=1, **way)
        assert found.new_tokens == expected, name
    config = GenerationConfig(max_new_tokens=8, no_repeat_ngram_size=1, eos_token_id=token, pad_token_id=6)
    found = model.generate(PROMPTS, generation_config=config)
    assert found.new_tokens == expected
    assert found.sequences[1, -1] == 6


def test_a_stop_string_ends_a_row_and_no_padding_follows(word_tokenizer):
    model = adaptive(build("llama"), "static:skip=1", tokenizer=word_tokenizer)
    plain = model.generate(["ab", "cde"], max_new_tokens=8, no_repeat_ngram_size=1)
    letter = word_tokenizer.decode(plain.new_tokens[0][2:3])
    assert len(letter) == 1
    found = model.generate(["ab", "cde"], max_new_tokens=8, no_repeat_ngram_size=1, stop_strings=[letter])
    for new, whole in zip(found.completions, plain.completions, strict=True):
        before, stop, _ = whole.partition(letter)
        assert new == before + stop
    assert found.new_tokens[0] == plain.new_tokens[0][:3]


def test_beams_end_before_their_padding(model):
    plain = model.generate(PROMPTS, max_new_tokens=8, num_beams=2)
    token = plain.new_tokens[0][2]
    ids = model.tokenizer(PROMPTS, return_tensors="pt", padding=True, padding_side="left")
    way = {"max_new_tokens": 8, "num_beams": 2, "eos_token_id": token, "pad_token_id": 6}
    sequences = model.generate(**ids, **way)[:, ids.input_ids.shape[1] :]
    found = model.generate(PROMPTS, **way)
    for row, new in zip(sequences.tolist(), found.new_tokens, strict=True):
        assert row[: len(new)] == new
        assert set(row[len(new) :]) <= {6}
        assert token not in new[:-1]


def test_prompts_read_in_batches_of_other_sizes_do_not_mix(model):
    for prompts in (PROMPTS, PROMPTS[:1], [*PROMPTS, "so"]):
        found = model.generate(prompts, max_new_tokens=5, no_repeat_ngram_size=1)
        assert len(found.new_tokens) == len(prompts)
        assert torch.equal(model.last_trace.real.any(1), torch.ones(len(prompts), dtype=torch.bool))
