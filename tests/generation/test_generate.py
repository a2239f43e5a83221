"""Generation: through transformers' generate() and through the lean loop, with everything people use around it."""

import pytest
import torch
from tiny import FEW, PLUGINS, adaptive, build, pairwise, ragged, shared, tokens
from transformers import (
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    TextIteratorStreamer,
    TextStreamer,
    pipeline,
)

import anee
from anee_core.adapter.cache_names import CACHE
from anee_core.conformance.subject import without_layers
from anee_core.errors import InputError

DENSE_AND_SKIPPING = [("dense", None), ("static:skip=1 4", None), ("random:p=0.4,protect=0 0", None)]


def matching_model(model, policy):
    """Return what generates the same without ANEE's engine: transformers, with skipped layers taken out."""
    return (
        model
        if policy == "dense"
        else without_layers(model, PLUGINS.adapters[model.config.model_type].layout.layers, {1, 4})
    )


WAYS = ("greedy", "sampling", "beams", "samples", "padding", "second turn", "penalty")
TRIED = pairwise(FEW, ("dense", "static:skip=1 4"), WAYS)


def like_transformers(way):
    """Parametrize a test by the families and policies that are tried with a way to generate."""
    return pytest.mark.parametrize(("family", "policy"), [row[:2] for row in TRIED if row[2] == way])


@like_transformers("greedy")
def test_greedy(family, policy):
    model, ids = shared(family), tokens(2, 7)
    ours, theirs = adaptive(model, policy), matching_model(model, policy)
    expected = theirs.generate(ids, max_new_tokens=12, do_sample=False)
    assert torch.equal(ours.generate(ids, max_new_tokens=12, do_sample=False), expected)
    assert torch.equal(ours.decode(ids, max_new_tokens=12).sequences, expected)


@like_transformers("sampling")
def test_sampling_draws_the_same_with_the_same_seed(family, policy):
    model, ids = shared(family), tokens(2, 7)
    options = {"max_new_tokens": 10, "do_sample": True, "temperature": 0.8, "top_p": 0.9, "top_k": 20}
    results = []
    for run in (
        matching_model(model, policy).generate,
        adaptive(model, policy).generate,
        lambda ids, **o: adaptive(model, policy).decode(ids, **o).sequences,
    ):
        torch.manual_seed(5)
        results.append(run(ids, **options))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("returned", [1, 3])
@like_transformers("beams")
def test_beams(family, policy, returned):
    model = shared(family)
    ids, mask = ragged([4, 7], "left")
    options = {"max_new_tokens": 8, "num_beams": 3, "num_return_sequences": returned, "do_sample": False}
    expected = matching_model(model, policy).generate(ids, attention_mask=mask, **options)
    assert torch.equal(adaptive(model, policy).generate(ids, attention_mask=mask, **options), expected)


@like_transformers("samples")
def test_several_samples_per_prompt(family, policy):
    model, ids = shared(family), tokens(2, 5)
    results = []
    for run in (matching_model(model, policy), adaptive(model, policy)):
        torch.manual_seed(2)
        results.append(run.generate(ids, max_new_tokens=6, do_sample=True, num_return_sequences=3))
    assert results[0].shape[0] == 6
    assert torch.equal(*results)


@like_transformers("padding")
def test_left_padded_batch(family, policy):
    model = shared(family)
    ids, mask = ragged([3, 8, 5], "left")
    expected = matching_model(model, policy).generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
    ours = adaptive(model, policy)
    assert torch.equal(ours.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False), expected)
    assert torch.equal(ours.decode(ids, mask, max_new_tokens=8).sequences, expected)


@like_transformers("second turn")
def test_second_turn_on_the_same_cache(family, policy):
    model, ids = shared(family), tokens(1, 6)
    ours, theirs = adaptive(model, policy), matching_model(model, policy)
    cache = ours.new_cache()
    first = ours.generate(ids, max_new_tokens=5, do_sample=False, past_key_values=cache)
    follow_up = torch.cat((first, tokens(1, 4, seed=9)), dim=1)
    second = ours.generate(follow_up, max_new_tokens=5, do_sample=False, past_key_values=cache)
    assert torch.equal(second, theirs.generate(follow_up, max_new_tokens=5, do_sample=False))
    assert cache.get_seq_length() == second.shape[1] - 1


@like_transformers("penalty")
def test_repetition_penalty_sees_the_whole_sequence(family, policy):
    model, ids = shared(family), tokens(2, 7)
    options = {"max_new_tokens": 12, "repetition_penalty": 1.8, "do_sample": False}
    expected = matching_model(model, policy).generate(ids, **options)
    assert torch.equal(adaptive(model, policy).generate(ids, **options), expected)
    assert torch.equal(adaptive(model, policy).decode(ids, **options).sequences, expected)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_the_cache_has_both_names_that_transformers_gives_it(name):
    model, ids = adaptive(build("llama"), "static:skip=1"), tokens(1, 6)
    wanted = model(ids).logits[:, 4:]
    cache = model.new_cache()
    model(ids[:, :4], **{name: cache})
    output = model(ids[:, 4:], **{name: cache})
    torch.testing.assert_close(output.logits, wanted, atol=2e-5, rtol=1e-4)
    assert output[CACHE] is cache
    assert output.past_key_values is cache
    cache = model.new_cache()
    model.generate(ids, max_new_tokens=3, do_sample=False, **{name: cache})
    assert cache.get_seq_length() == 8
    with pytest.raises(InputError, match=r"a DynamicCache cannot be used.*start from model.new_cache\(\)"):
        model.generate(ids, **{name: DynamicCache()})
    for run in (model, model.generate):
        with pytest.raises(InputError, match="two names of one thing"):
            run(ids, cache=model.new_cache(), past_key_values=model.new_cache())


@pytest.mark.parametrize(("policy", "budget"), [*DENSE_AND_SKIPPING, ("heuristic:protect=1 1", 0.7)])
def test_generate_and_the_lean_loop_agree(policy, budget):
    model = adaptive(build("llama"), policy, budget)
    ids, mask = ragged([3, 8, 5], "left")
    through_transformers = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
    ran = model.last_trace.ran
    result = model.decode(ids, mask, max_new_tokens=8)
    assert torch.equal(result.sequences, through_transformers)
    assert torch.equal(result.trace.ran, ran)


@pytest.mark.parametrize("beams", [1, 3])
def test_beams_under_a_policy_equal_a_run_without_a_cache(beams):
    """Rows, slots and feedback all follow the beams: a run that recomputes everything each step agrees."""
    for policy, budget in (("random:p=0.4,protect=0 0", None), ("heuristic:protect=1 1", 0.7)):
        model, ids = adaptive(build("llama"), policy, budget, prefill="adaptive"), tokens(2, 5)
        options = {"max_new_tokens": 5, "num_beams": beams, "do_sample": False}
        cached = model.generate(ids, **options)
        assert torch.equal(cached, model.generate(ids, use_cache=False, **options))


def test_end_of_sequence_stops_each_row():
    model, ids = adaptive(build("llama")), tokens(3, 6)
    free = model.decode(ids, max_new_tokens=12).new_tokens
    end = free[1][4]
    expected = [row[: row.index(end) + 1] if end in row else row for row in free]
    result = model.decode(ids, max_new_tokens=12, eos_token_id=end, pad_token_id=0)
    assert result.new_tokens == expected
    padded = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=end, pad_token_id=0)
    assert torch.equal(result.sequences, padded)


def test_ended_rows_are_not_computed_any_more():
    model, ids = adaptive(build("llama")), tokens(3, 6)
    end = model.decode(ids, max_new_tokens=12).new_tokens[1][4]
    result = model.decode(ids, max_new_tokens=12, eos_token_id=end)
    fed = [6 + len(row) - 1 for row in result.new_tokens]
    assert result.trace.real.sum(1).tolist() == fed
    assert min(fed) < max(fed)
    assert result.trace.flops["head"] == sum(map(len, result.new_tokens)) * model.engine.costs.head.flops


def test_streamers_get_every_token(word_tokenizer, capsys):
    model = adaptive(build("llama"), tokenizer=word_tokenizer)
    silent = model.generate("abc", max_new_tokens=8)
    model.generate("abc", max_new_tokens=8, streamer=TextStreamer(word_tokenizer))
    assert capsys.readouterr().out.rstrip("\n") == silent.text
    iterator = TextIteratorStreamer(word_tokenizer, skip_prompt=True)
    ids = word_tokenizer("abc", return_tensors="pt")["input_ids"]
    model.generate(ids, max_new_tokens=8, do_sample=False, streamer=iterator)
    assert "".join(iterator) == silent.completion


def test_stop_string_of_several_tokens(word_tokenizer):
    model = adaptive(build("llama"), tokenizer=word_tokenizer)
    free = model.generate("abc", max_new_tokens=12).completion
    stop = free[5:8]
    expected = free[: free.index(stop) + len(stop)]
    assert model.generate("abc", max_new_tokens=12, stop_strings=stop).completion == expected
    ids = word_tokenizer("abc", return_tensors="pt")["input_ids"]
    through = model.generate(ids, max_new_tokens=12, do_sample=False, stop_strings=stop, tokenizer=word_tokenizer)
    assert word_tokenizer.decode(through[0, ids.shape[1] :]) == expected


def test_own_processors_and_criteria_see_whole_sequences():
    lengths = []

    class Watch(LogitsProcessor):
        def __call__(self, input_ids, scores):
            lengths.append(tuple(input_ids.shape))
            scores[:, 50] = 1e9
            return scores

    class StopAtNine(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 9)

    model, ids = adaptive(build("gpt2"), "static:skip=2"), tokens(2, 6)
    for run in (model.generate, lambda i, **o: model.decode(i, **o).sequences):
        lengths.clear()
        result = run(
            ids,
            max_new_tokens=12,
            do_sample=False,
            logits_processor=LogitsProcessorList([Watch()]),
            stopping_criteria=[StopAtNine()],
        )
        assert result.shape == (2, 9)
        assert (result[:, 6:] == 50).all()
        assert lengths == [(2, 6), (2, 7), (2, 8)]


def test_text_of_several_prompts(word_tokenizer):
    model = adaptive(build("gpt2"), "random:p=0.4,protect=0 0", tokenizer=word_tokenizer)
    prompts = ["abc", "hello there", "x"]
    together = model.generate(prompts, max_new_tokens=6)
    alone = [model.generate(prompt, max_new_tokens=6) for prompt in prompts]
    assert together.texts == [result.text for result in alone]
    assert all(text.startswith(prompt) for text, prompt in zip(together.texts, prompts, strict=True))
    assert together.trace.tokens[2][-7] == "x"


def test_text_with_beams_goes_through_transformers(word_tokenizer):
    model = adaptive(build("gpt2"), tokenizer=word_tokenizer)
    result = model.generate("abc", max_new_tokens=6, num_beams=3, num_return_sequences=2)
    assert len(result.texts) == 2
    assert all(text.startswith("abc") for text in result.texts)


def test_works_in_a_pipeline(word_tokenizer):
    model = adaptive(build("llama"), "static:skip=2", tokenizer=word_tokenizer)
    generator = pipeline("text-generation", model=model, tokenizer=word_tokenizer)
    text = generator("abc", max_new_tokens=6, do_sample=False)[0]["generated_text"]
    assert text == model.generate("abc", max_new_tokens=6).text


def test_one_new_token_from_a_prompt_of_one():
    for family in FEW:
        model, ids = build(family), tokens(1, 1)
        result = adaptive(model).decode(ids, max_new_tokens=1)
        assert torch.equal(result.sequences, model.generate(ids, max_new_tokens=1, do_sample=False))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": 2.5}, "max_new_tokens is a whole number"),
        ({"do_sample": True, "temperature": 0.0}, "temperature"),
        ({"top_k": -1}, "top_k is a whole number"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is a number, at least 1e-06"),
        ({"do_sample": True, "seed": 1 << 70}, "seed is a whole number, at least 0"),
        ({"top_p": 1.5}, "top_p"),
        ({"max_tokens": 3}, "no option 'max_tokens'"),
        ({"stop_strings": "x"}, "tokenizer"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        adaptive(build("llama")).decode(tokens(), **options)


def test_a_temperature_does_not_matter_without_sampling():
    model = adaptive(build("llama"))
    greedy = model.decode(tokens(), max_new_tokens=3)
    assert torch.equal(model.decode(tokens(), max_new_tokens=3, temperature=0.0).sequences, greedy.sequences)


@pytest.mark.parametrize("ids", [tokens()[0], tokens().tolist()])
def test_prompts_that_are_no_batch_are_refused(ids):
    with pytest.raises(InputError, match=r"input_ids is a tensor \[batch, tokens\]; got"):
        adaptive(build("llama")).decode(ids)


@pytest.mark.parametrize("policy", ["tova:keep=0.2", "h2o:keep=0.2"])
def test_assisted_decoding_gives_the_same_when_the_cache_grows_in_between(policy):
    model, ids = adaptive(build("llama"), policy), tokens(1, 40)
    alone = model.decode(ids, max_new_tokens=30, eos_token_id=[]).sequences
    helped = model.generate(ids, max_new_tokens=30, do_sample=False, prompt_lookup_num_tokens=3, eos_token_id=None)
    assert torch.equal(helped, alone[:, : helped.shape[1]])


def test_cache_implementation_cannot_be_chosen():
    with pytest.raises(InputError, match="brings its own cache"):
        adaptive(build("llama")).generate(tokens(), cache_implementation="static")


@pytest.mark.parametrize("prefill", ["adaptive", "dense", "auto"])
def test_prompt_is_read_as_chosen(prefill):
    ids = tokens(1, 9)
    for policy, budget, auto in (("static:skip=1", None, "adaptive"), ("heuristic:protect=1 1", 0.7, "dense")):
        model = adaptive(build("llama"), policy, budget, prefill=prefill)
        for run in (model.generate, model.decode):
            run(ids, max_new_tokens=4, do_sample=False)
            prompt = model.last_trace.ran[:, :, :9]
            assert bool(prompt.all()) == ((auto if prefill == "auto" else prefill) == "dense")
            assert not model.last_trace.ran[:, :, 9:].all()


def test_seed_of_a_call_is_its_own():
    model, ids = adaptive(build("llama")), tokens(1, 5)
    state = torch.get_rng_state()
    first = model.decode(ids, max_new_tokens=8, do_sample=True, seed=1).new_tokens
    assert first == model.decode(ids, max_new_tokens=8, do_sample=True, seed=1).new_tokens
    assert first != model.decode(ids, max_new_tokens=8, do_sample=True, seed=2).new_tokens
    assert torch.equal(state, torch.get_rng_state())


def test_assisted_decoding_rolls_back_exactly():
    """transformers' own speculation crops the cache after every rejected draft."""
    model, ids = build("llama"), tokens(1, 8)
    expected = model.generate(ids, max_new_tokens=12, do_sample=False)
    ours = adaptive(model)
    assert torch.equal(ours.generate(ids, max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=3), expected)
    assert torch.equal(ours.generate(ids, max_new_tokens=12, do_sample=False, assistant_model=build("llama")), expected)


def test_what_a_generation_returns_can_be_changed_and_trained_on():
    model = adaptive(build("llama"), "random:p=0.4,protect=0 0")
    result = model.decode(tokens(2, 5), max_new_tokens=4)
    result.sequences[0, 0] = 5
    assert not any(t.is_inference() for t in (result.sequences, result.trace.ran))
    model(result.sequences, labels=result.sequences).loss.backward()


def test_settings_that_the_lean_loop_does_not_know_go_through_transformers(llama_folder, caplog):
    model = anee.load(llama_folder)
    plain = model.generate("the night was", max_new_tokens=12).new_tokens[0]
    model.generation_config.min_new_tokens = 12
    model.generation_config.eos_token_id = plain[3]
    ended = model.generate("the night was", max_new_tokens=12)
    assert len(ended.new_tokens[0]) == 12
    assert not caplog.records
    assert model.decode(tokens(1, 4), max_new_tokens=2).new_tokens
    assert "min_new_tokens is not followed here" in caplog.text
    with pytest.raises(InputError, match="set_seed"):
        model.generate("the night was", max_new_tokens=3, num_beams=2, seed=0)


def test_new_tokens_of_beams_come_without_padding(llama_folder):
    model = anee.load(llama_folder)
    prompts = ["the night was", "she went to the door and"]
    free = model.generate(prompts, max_new_tokens=8, num_beams=2)
    end = free.new_tokens[0][2]
    ended = model.generate(prompts, max_new_tokens=8, num_beams=2, eos_token_id=end)
    assert all(end not in row[:-1] for row in ended.new_tokens)
    assert len({len(row) for row in ended.new_tokens}) == 2
