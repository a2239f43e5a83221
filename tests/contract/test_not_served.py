"""What is not served is refused in one line."""

import pytest
import torch
from tiny import SEVEN, adaptive, build, shared, tokens
from transformers import GenerationConfig
from transformers.cache_utils import DynamicCache

from anee_core.errors import InputError

IDS, SQUARE = tokens(2, 6), torch.ones(2, 1, 6, 6)
REFUSED = {
    "attention weights": (lambda model: model(IDS, output_attentions=True), "takes no 'output_attentions'"),
    "4-D masks": (
        lambda model: model(IDS, attention_mask=SQUARE),
        r"attention_mask is \[batch, tokens\]",
    ),
    "types of tokens": (lambda model: model(IDS, token_type_ids=IDS), "takes no 'token_type_ids'"),
    "places in a cache": (lambda model: model(IDS, cache_position=torch.arange(6)), "takes no 'cache_position'"),
    "static caches": (
        lambda model: model.generate(IDS, cache_implementation="static", max_new_tokens=2),
        "cache_implementation 'static' cannot be chosen: ANEE brings its own cache",
    ),
    "static caches, in a config": (
        lambda model: model.generate(
            IDS, generation_config=GenerationConfig(cache_implementation="static", max_new_tokens=2)
        ),
        "cache_implementation 'static' cannot be chosen: ANEE brings its own cache",
    ),
    "other caches": (lambda model: model(IDS, past_key_values=DynamicCache()), r"start from model.new_cache\(\)"),
    "continuous batching": (lambda model: model.generate_batch([[5, 6]]), "continuous batching does not work"),
    "export": (lambda model: torch.export.export(model, (IDS,)), "cannot be exported"),
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("family", SEVEN)
def test_what_is_not_served_is_refused_in_one_line(family, what):
    ask, message = REFUSED[what]
    with pytest.raises(InputError, match=message) as refused:
        ask(adaptive(shared(family), "static:skip=1"))
    assert "\n" not in str(refused.value)


def test_a_kind_of_cache_that_makes_no_difference_is_let_through():
    network = build("llama")
    expected = adaptive(network).generate(IDS, max_new_tokens=3, do_sample=False)
    ways = (
        {"cache_implementation": "dynamic", "max_new_tokens": 3, "do_sample": False},
        {"generation_config": GenerationConfig(cache_implementation="dynamic", max_new_tokens=3, do_sample=False)},
    )
    for way in ways:
        assert torch.equal(adaptive(network).generate(IDS, **way), expected)
    network.generation_config.cache_implementation = "hybrid"  # as some checkpoints have it
    assert torch.equal(adaptive(network).generate(IDS, max_new_tokens=3, do_sample=False), expected)


@torch.no_grad()
def test_a_compiled_model_runs_as_it_is():
    model = adaptive(build("llama"), "random:p=0.5,protect=0 0")
    compiled = torch.compile(model)
    for length in (6, 3, 1):
        torch.testing.assert_close(compiled(IDS[:, :length]).logits, model(IDS[:, :length]).logits)


@pytest.mark.parametrize("family", SEVEN)
@torch.no_grad()
def test_a_compiled_model_is_what_the_model_is(family):
    compiled = torch.compile(adaptive(shared(family), "static:skip=1 3"))
    torch.testing.assert_close(compiled(IDS).logits, adaptive(shared(family), "static:skip=1 3")(IDS).logits)
