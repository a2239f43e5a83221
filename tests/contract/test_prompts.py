"""A prompt is known by its length: in pieces or whole, with drafts or without, what is read densely is the prompt."""

import pytest
import torch
from tiny import adaptive, build, tokens

GREEDY = {"max_new_tokens": 8, "do_sample": False}
REPEATED = tokens(1, 6).repeat(1, 3)


@pytest.mark.parametrize("policy", ["static:skip=1 3", "random:p=0.5,protect=0 0", "static:skip=1 3+knorm:keep=0.5"])
@pytest.mark.parametrize("prefill", ["dense", "adaptive"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon-multi-query", "gemma2"])
def test_the_prompt_is_read_alike_in_pieces_and_beside_drafts(family, policy, prefill):
    network = build(family)
    model = adaptive(network, policy, prefill=prefill)
    plain, ran = model.generate(REPEATED, **GREEDY), []
    skipping = "dense" not in prefill
    for way in ({}, {"prefill_chunk_size": 5}, {"prompt_lookup_num_tokens": 3}, {"assistant_model": network}):
        assert torch.equal(model.generate(REPEATED, **GREEDY, **way), plain), way
        trace = model.last_trace
        ran.append(trace.ran[..., :18])
        assert bool(trace.ran[..., :18].all()) != skipping
        assert not bool(trace.ran[..., 18:].all(1).all()), "what comes after the prompt goes by the policy"
    for other in ran[1:]:
        assert torch.equal(other, ran[0])


DROPPING = (
    "window:sinks=2,recent=8",
    "tova:keep=0.3,least=4",
    "h2o:keep=0.3,least=4",
    "knorm:keep=0.4",
    "snapkv:keep=0.3",
)


@pytest.mark.parametrize("policy", ["static:skip=1 3", *DROPPING])
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_a_model_that_drops_tokens_may_draft(family, policy):
    network = build(family)
    expected = network.generate(REPEATED, max_new_tokens=16, do_sample=False)
    draft = adaptive(build(family), policy)
    assert torch.equal(network.generate(REPEATED, max_new_tokens=16, do_sample=False, assistant_model=draft), expected)
    main = adaptive(network, policy)
    plain = main.generate(REPEATED, max_new_tokens=16, do_sample=False)
    found = main.generate(REPEATED, max_new_tokens=16, do_sample=False, assistant_model=draft)
    assert torch.equal(found, plain)


def test_a_prompt_that_goes_on_in_a_cache_is_dense_up_to_its_length():
    model = adaptive(build("llama"), "static:skip=1 3", prefill="dense")
    cache = model.new_cache()
    first = model.generate(REPEATED, past_key_values=cache, **GREEDY)
    longer = torch.cat((first, tokens(1, 4, seed=5)), dim=1)
    seen = cache.seen
    model.generate(longer, past_key_values=cache, **GREEDY)
    new = longer.shape[1] - seen
    assert bool(model.last_trace.ran[..., :new].all())
    assert not bool(model.last_trace.ran[..., new:].all())


def test_a_guided_generation_reports_its_own_work():
    model, way = adaptive(build("llama"), "static:skip=1 3"), {"max_new_tokens": 6, "do_sample": False}
    model.generate(REPEATED, **way)
    plain = model.last_trace
    model.generate(REPEATED, guidance_scale=1.5, **way)  # which asks the model a second time for each token
    guided = model.last_trace
    assert torch.equal(guided.real, plain.real)
    assert guided.flops == plain.flops
