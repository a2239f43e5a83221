"""The policy keeps ANEE's promises, and its own."""

import pytest
import torch
from anee_staggered import StaggeredController
from transformers import AutoModelForCausalLM

import anee
from anee_core.conformance import PolicyConformance
from anee_core.conformance.tiny import small_config
from anee_core.errors import PolicyError


class TestStaggered(PolicyConformance):
    policies = {
        "share": (StaggeredController(share=0.5, protect=(1, 1)), None),
        "budget": (StaggeredController(protect=(1, 1)), 0.7),
    }


def test_neighbours_skip_different_layers_and_the_same_number():
    model = anee.load(AutoModelForCausalLM.from_config(small_config("llama")), StaggeredController(0.5, (0, 0)))
    model(torch.arange(60)[None])
    ran = model.last_trace.ran[:, 0]
    assert abs(ran.float().mean().item() - 0.5) < 0.02
    assert (ran[:, 1:] != ran[:, :-1]).any(0).all()


def test_without_share_and_budget_it_says_what_to_give():
    network = AutoModelForCausalLM.from_config(small_config("llama"))
    with pytest.raises(PolicyError, match="or give a budget"):
        anee.load(network, StaggeredController())
    with pytest.raises(PolicyError, match="share is a number, at least 0 and at most 1"):
        StaggeredController(share=1.5)
