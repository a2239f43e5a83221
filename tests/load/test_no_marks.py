"""Loading and running leave no mark on a model, or on other models in the process."""

import copy

import pytest
import torch
from tiny import QUICK

import anee

IDS = torch.randint(2, 97, (2, 11), generator=torch.Generator().manual_seed(0))


def test_two_models_in_one_process_do_not_interact(tiny_llama, tiny_gpt2):
    """Two families, and one network under two policies, used by turns."""

    wanted = [
        (tiny_llama, "static:skip=1 2", None),
        (tiny_gpt2, "random:p=0.5,protect=1 1+window:sinks=1,recent=4", None),
        (tiny_llama, "heuristic:protect=1 1", 0.7),
        (tiny_llama, "dense", None),
    ]

    def load(network, policy, budget):
        return anee.load(network, policy, budget, prefill="adaptive", calibration=QUICK)

    def steps(model):
        ids, cache = IDS, model.new_cache()
        for _ in range(4):
            output = model(ids[:, cache.get_seq_length() :], past_key_values=cache)
            yield output.logits, model.last_trace.ran
            ids = torch.cat((ids, output.logits[:, -1:].argmax(-1)), dim=1)

    alone = [list(steps(load(*each))) for each in wanted]
    by_turns = zip(*zip(*(steps(load(*each)) for each in wanted), strict=True), strict=True)
    for expected, found in zip(alone, by_turns, strict=True):
        for (logits, ran), (other_logits, other_ran) in zip(expected, found, strict=True):
            assert torch.equal(other_logits, logits)
            assert torch.equal(other_ran, ran)
    assert not torch.equal(alone[0][-1][0], alone[2][-1][0])


def marks(network):
    """Return everything about a network that loading and running it could change."""
    return {
        "keys": list(network.state_dict()),
        "modules": [(name, id(module), type(module), module.training) for name, module in network.named_modules()],
        "parameters": [(n, id(p), p.dtype, p.requires_grad, p._version) for n, p in network.named_parameters()],
        "attributes": [sorted(vars(module)) for module in network.modules()],
        "hooks": [
            len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks)
            for module in network.modules()
        ],
        "patched": [name for name, module in network.named_modules() if "forward" in vars(module)],
        "config": network.config.to_dict(),
        "attention": network.config._attn_implementation,
        "generation": network.generation_config.to_dict(),
    }


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("family", ["tiny_llama", "tiny_gpt2"])
def test_loading_and_running_leave_the_model_as_it_was(request, family, training):
    network = copy.deepcopy(request.getfixturevalue(family)).train(training)
    weights = {name: parameter.clone() for name, parameter in network.named_parameters()}
    expected = copy.deepcopy(network).eval()(IDS).logits
    before = marks(network)
    for policy in ("static:skip=1 2", "heuristic:protect=1 1+window:sinks=1,recent=4"):
        model = anee.load(network, policy, 0.75, calibration=QUICK)
        model(IDS)
        model.decode(IDS, max_new_tokens=3)
        model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=3, do_sample=False)
    after = marks(network)
    for name, value in before.items():
        assert after[name] == value, name
    assert all(torch.equal(parameter, weights[name]) for name, parameter in network.named_parameters())
    assert torch.equal(network.eval()(IDS).logits, expected)


@pytest.mark.parametrize("training", [False, True])
def test_loading_leaves_each_part_in_its_own_mode(tiny_llama, training):
    """As in a model that is fine-tuned in part, with the dropout of the rest switched off."""
    network = copy.deepcopy(tiny_llama).train(training)
    network.model.layers[2].train(not training)
    anee.load(network, "static:skip=1")
    assert network.training == training
    assert network.model.layers[1].training == training
    assert network.model.layers[2].training != training
