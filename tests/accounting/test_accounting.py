"""What the trace reports is what a counter on the executed operations measures."""

import pytest
import torch
from tiny import FEW, adaptive, build, pairwise, ragged, shared, tokens

from anee_core.accounting.work import executed_work, layer_work, stored_bytes
from anee_core.conformance.cost import counted

POLICIES = [
    "dense",
    "static:skip=1 4",
    "random:p=0.5,protect=0 0",
    "random:p=0.3,exit=0.3,protect=0 1",
    "static:exit=2",
]


@pytest.mark.parametrize(
    ("family", "policy", "loop"),
    pairwise(FEW, (*POLICIES, "heuristic:protect=1 1", "window:sinks=1,recent=3"), ("decode", "generate")),
)
def test_flops_of_a_generation_equal_the_counter(family, policy, loop):
    model = adaptive(shared(family), policy)
    ids, mask = ragged([4, 7], "left")
    spent = counted(lambda: getattr(model, loop)(ids, attention_mask=mask, max_new_tokens=4, do_sample=False))
    assert spent == model.last_trace.flops["spent"]


def test_keys_and_values_cost_a_sixth_of_a_gpt2_block():
    costs = adaptive(build("gpt2")).engine.costs
    assert costs.propagate[0].flops * 6 == costs.run[0].flops


def test_keys_and_values_cost_far_less_with_grouped_queries():
    model = build("llama")
    costs = adaptive(model).engine.costs
    width, narrow, inner = 32, 16, 64
    assert costs.propagate[0].flops == 2 * 2 * width * narrow
    assert costs.run[0].flops == 2 * (2 * width * width + 2 * width * narrow + 3 * width * inner)


def test_parts_add_up_and_stand_apart():
    model = adaptive(build("llama"), "static:skip=1 4")
    model(tokens(1, 10))
    flops, weights = model.last_trace.flops, model.last_trace.weight_bytes
    for parts in (flops, weights):
        assert parts["layers"] + parts["propagation"] + parts["head"] + parts["embedding"] == parts["spent"]
        assert 0 < parts["propagation"] < parts["layers"]
    assert flops["head"] == 10 * 2 * 32 * 97
    assert flops["embedding"] == 0
    assert weights["embedding"] == 10 * 32 * 4 + 32 * 4  # rows of the table, and the final norm
    assert weights["head"] == 97 * 32 * 4


def test_weight_bytes_are_those_of_the_modules_that_ran():
    model = build("llama")
    ours = adaptive(model, "static:skip=2")
    ours(tokens(1, 1))
    layers = [sum(p.numel() * p.element_size() for p in layer.parameters()) for layer in model.model.layers]
    skipped = model.model.layers[2]
    projections = (skipped.input_layernorm, skipped.self_attn.k_proj, skipped.self_attn.v_proj)
    assert ours.last_trace.weight_bytes["layers"] == sum(layers) - layers[2]
    assert ours.last_trace.weight_bytes["propagation"] == sum(
        p.numel() * p.element_size() for module in projections for p in module.parameters()
    )


def test_budget_spent_is_the_share_of_layer_flops():
    model = adaptive(build("gpt2"), "static:skip=0 1 2")
    model(tokens(1, 8))
    spent = model.last_trace.spent()
    assert model.last_trace.budget_spent == (spent.layer_flops + spent.propagation_flops) / spent.dense_layer_flops
    # Half the blocks run, the other half project keys and values: 1/2 + 1/2 x 1/6 of the linears; attention is less.
    assert 0.5 < model.last_trace.budget_spent < 0.5 + 0.5 / 6


def test_executed_work_counts_only_what_is_called():
    layer = build("llama").model.layers[0]
    norm, inputs = layer.input_layernorm, torch.zeros(1, 1, 32)
    assert executed_work(layer, lambda: layer.self_attn.k_proj(norm(inputs))).flops == 2 * 32 * 16
    assert layer_work(layer, None, None).flops == adaptive(build("llama")).engine.costs.run[0].flops
    assert not layer._forward_hooks
    assert not layer.self_attn.k_proj._forward_hooks


def test_stored_bytes_looks_inside_quantised_weights():
    quantization = pytest.importorskip("torchao.quantization")
    linear = torch.nn.Linear(64, 64, bias=False)
    quantization.quantize_(linear, quantization.Int8WeightOnlyConfig())
    assert stored_bytes(linear.weight) < 64 * 64 * 2
