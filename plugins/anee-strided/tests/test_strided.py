"""The policy keeps ANEE's promises, and its own."""

import pytest
import torch
from anee_strided import StridedCachePolicy
from transformers import AutoModelForCausalLM

import anee
from anee_core.conformance import PolicyConformance
from anee_core.conformance.tiny import small_config
from anee_core.errors import PolicyError


class TestStrided(PolicyConformance):
    policies = {"strided": (StridedCachePolicy(every=3, recent=4), None)}


def test_recent_tokens_and_every_third_older_one_stay():
    model = anee.load(AutoModelForCausalLM.from_config(small_config("llama")), StridedCachePolicy(3, 4))
    cache = model(torch.arange(20)[None]).past_key_values
    slots = cache.slots[0]
    assert slots.positions()[slots.valid()].tolist() == [0, 3, 6, 9, 12, 15, 16, 17, 18, 19]


def test_wrong_options_are_refused():
    with pytest.raises(PolicyError, match="every is a whole number, at least 1"):
        StridedCachePolicy(every=0)
