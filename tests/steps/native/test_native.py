"""The native layer step: its kernels against torch, when it is used, and when it steps back."""

import copy
import math
from concurrent.futures import ThreadPoolExecutor
from ctypes import addressof

import peft
import pytest
import torch
from tiny import adaptive, build, ragged, tokens
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

import anee
from anee_core.errors import InputError, ModelError
from anee_core.steps.deferred import DeferredStep
from anee_core.steps.native.build import library
from anee_core.steps.native.pointers import KINDS, Pointers
from anee_core.steps.native.step import MAX_TOKENS, NativeStep
from anee_core.steps.quantised import Int4Linear, Int8Linear


def apply(matrix, states, dtype, threads=2):
    """Return what the library makes of states [M, inputs]."""
    count = states.shape[0]
    out = torch.empty(count, matrix.outputs, dtype=dtype)
    scratch = torch.full((count * (matrix.inputs + matrix.outputs + 32),), math.nan)
    library().anee_linear(
        addressof(matrix), states.data_ptr(), out.data_ptr(), count, KINDS[dtype], scratch.data_ptr(), threads
    )
    return out


def close(found, wanted, dtype):
    exact = dtype == torch.float32
    torch.testing.assert_close(
        found.float(), wanted.float(), atol=2e-5 if exact else 0.05, rtol=1e-5 if exact else 0.02
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("inputs", "outputs"), [(16, 16), (33, 7), (5, 70), (64, 129), (250, 300), (576, 64), (1056, 50)]
)
def test_products_of_any_shape(dtype, inputs, outputs):
    torch.manual_seed(0)
    linear = nn.Linear(inputs, outputs).to(dtype)
    transposed = Conv1D(outputs, inputs).to(dtype)
    nn.init.normal_(transposed.bias)
    for count in (1, 2, 3, 4, 7, 16, 37):  # from 16 on they are set side by side
        states = torch.randn(count, inputs, dtype=dtype)
        kinds = (Int8Linear, Int4Linear) if inputs % 32 == 0 else (Int8Linear,)
        for module in (linear, transposed, *(kind(linear.weight, linear.bias) for kind in kinds)):
            with torch.no_grad():
                close(apply(Pointers(dtype).matrix(module), states, dtype), module(states), dtype)


def test_part_of_a_product_whose_heads_alternate():
    linear, states = nn.Linear(32, 3 * 4 * 10), torch.randn(3, 32)
    part = Pointers(torch.float32).part(linear, 10, 40)
    part.group, part.group_stride = 10, 30
    with torch.no_grad():
        wanted = linear(states).view(3, 4, 3, 10)[:, :, 1].reshape(3, 40)
        close(apply(part, states, torch.float32), wanted, torch.float32)
        for kind, off in ((Int8Linear, 0.02), (Int4Linear, 0.2)):
            small = Pointers(torch.float32).part(module := kind(linear.weight, linear.bias), 10, 40)
            small.group, small.group_stride = 10, 30
            found = apply(small, states, torch.float32)
            torch.testing.assert_close(found, wanted, atol=off, rtol=0)
            close(found, module(states).view(3, 4, 3, 10)[:, :, 1].reshape(3, 40), torch.float32)


@pytest.fixture
def network():
    return build("llama")


def logits_of(model, ids, count=4):
    cache, found = model.new_cache(), []
    with torch.no_grad():
        for t in range(count):
            found.append(model(ids[:, t : t + 1], past_key_values=cache).logits)
    return torch.cat(found, dim=1)


def test_a_model_runs_fast_unless_told_otherwise(network):
    fast, slow = adaptive(network), adaptive(network, fast=False)
    found, wanted = (logits_of(model, tokens()) for model in (fast, slow))
    assert fast.slow_because is None
    assert slow.slow_because == "fast=False"
    assert not torch.equal(found, wanted)  # another order of sums
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_gradients_counters_and_long_blocks_go_through_the_modules(network):
    fast, slow, ids = adaptive(network), adaptive(network, fast=False), tokens(1, 8)
    fast(ids).logits.sum().backward()
    assert network.model.layers[0].mlp.up_proj.weight.grad is not None
    with torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            fast(ids)
        assert counter.get_total_flops() > 0
        long = tokens(2, MAX_TOKENS)
        assert torch.equal(fast(long).logits, slow(long).logits)


def test_changed_weights_are_seen(network):
    network = copy.deepcopy(network)
    fast, slow, ids = adaptive(network), adaptive(network, fast=False), tokens()
    before = logits_of(fast, ids)
    with torch.no_grad():
        network.model.layers[1].mlp.down_proj.weight.mul_(1.5)
    torch.testing.assert_close(logits_of(fast, ids), logits_of(slow, ids), atol=1e-5, rtol=1e-4)
    network.model.layers[1].mlp.down_proj.weight = nn.Parameter(torch.zeros(32, 64))
    torch.testing.assert_close(logits_of(fast, ids), logits_of(slow, ids), atol=1e-5, rtol=1e-4)
    assert (logits_of(fast, ids) - before).abs().max() > 0.1
    network.to(torch.bfloat16)
    assert logits_of(fast, ids).dtype == torch.bfloat16
    assert fast.slow_because is None


def test_what_is_hung_on_a_model_is_run(network):
    network = copy.deepcopy(network)
    fast, slow, ids = adaptive(network), adaptive(network, fast=False), tokens()
    logits_of(fast, ids)
    hook = network.model.layers[2].mlp.register_forward_hook(lambda module, args, output: 2 * output)
    assert torch.equal(logits_of(fast, ids), logits_of(slow, ids))
    hook.remove()
    hook = network.model.layers[2].mlp.up_proj.register_forward_hook(lambda module, args, output: 2 * output)
    assert torch.equal(logits_of(fast, ids), logits_of(slow, ids))
    assert "hooked" in fast.slow_because
    hook.remove()
    logits_of(fast, ids)
    assert fast.slow_because is None
    wrapped = peft.get_peft_model(network, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    assert torch.equal(logits_of(fast, ids), logits_of(slow, ids))
    assert "quantised, wrapped or hooked" in fast.slow_because
    wrapped.merge_and_unload()


@pytest.mark.parametrize("path", ["model.norm", "lm_head"])
def test_what_follows_the_layers_may_change_too(network, path):
    network = copy.deepcopy(network)
    fast, slow, ids = adaptive(network), adaptive(network, fast=False), tokens()
    before, module = logits_of(fast, ids), network.get_submodule(path)
    hook = module.register_forward_hook(lambda module, args, output: 2 * output)
    torch.testing.assert_close(logits_of(fast, ids), logits_of(slow, ids), atol=1e-5, rtol=1e-4)
    hook.remove()
    module.weight = nn.Parameter(module.weight.detach() * 1.5)
    torch.testing.assert_close(logits_of(fast, ids), logits_of(slow, ids), atol=1e-5, rtol=1e-4)
    assert (logits_of(fast, ids) - before).abs().max() > 0.1


def test_transformers_own_hooks_do_not_matter(network):
    ids = tokens()
    with torch.no_grad():
        network(ids, output_hidden_states=True)
    assert any(module._forward_hooks for module in network.modules())
    fast = adaptive(network)
    torch.testing.assert_close(
        logits_of(fast, ids), logits_of(adaptive(network, fast=False), ids), atol=1e-5, rtol=1e-4
    )
    assert fast.slow_because is None


def test_training_mode_goes_through_the_modules():
    network = build("gpt2").train()
    fast = adaptive(network)
    logits_of(fast, tokens())
    assert "training" in fast.slow_because


def test_without_a_compiler_models_run_all_the_same(network, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    library.cache_clear()
    try:
        fast, slow, ids = adaptive(network), adaptive(network, fast=False), tokens()
        assert torch.equal(logits_of(fast, ids), logits_of(slow, ids))
        assert "no-such-compiler" in fast.slow_because
    finally:
        library.cache_clear()


def test_threads_share_a_model(network):
    model = adaptive(network, "random:p=0.4,protect=0 0")
    prompts = [tokens(1 + i % 2, 4 + i, seed=i) for i in range(8)]
    alone = [model.decode(prompt, max_new_tokens=12).sequences for prompt in prompts]
    with ThreadPoolExecutor(4) as pool:
        together = pool.map(lambda prompt: model.decode(prompt, max_new_tokens=12).sequences, prompts * 3)
        for found, wanted in zip(together, alone * 3, strict=True):
            assert torch.equal(found, wanted)
    assert model.slow_because is None


def test_families_without_a_recipe_say_so():
    model = adaptive(build("falcon-grouped"))
    logits_of(model, tokens())
    assert model.slow_because == "there is no recipe for a FalconDecoderLayer"


def deferred(network, policy):
    model = adaptive(network, policy)
    step = DeferredStep(NativeStep(model.adapter, model.parts))
    model.use_step(step)
    return model


def test_what_is_owed_is_bounded_and_counted(network):
    model, cache = deferred(network, "static:skip=2"), None
    cache = model.new_cache(200)
    sizes = []
    with torch.no_grad():
        for t in range(100):
            model(tokens(1, 100)[:, t : t + 1], past_key_values=cache)
            sizes.append(cache.layer_nbytes()[2])
    one = 32 * 4
    owed = [size % (2 * 2 * 200 * 8 * 4) // one for size in sizes]
    assert max(owed) in range(32, 65)  # never more than that many hidden states
    assert owed[-1] != owed[-2]
    before = cache.nbytes()
    copied = copy.deepcopy(cache)  # pays, and takes no model along
    assert copied.settle_with is None
    assert cache.nbytes() < before


def test_a_failed_forward_owes_nothing(network, monkeypatch):
    model, twin = deferred(network, "static:skip=1 2"), adaptive(network, "static:skip=1 2", fast=False)
    ids = tokens(2, 7)
    cache, other = model.new_cache(), twin.new_cache()
    with torch.no_grad():
        for t in range(5):
            model(ids[:, t : t + 1], past_key_values=cache)
            twin(ids[:, t : t + 1], past_key_values=other)
        with monkeypatch.context() as patch:
            patch.setattr(model.engine.step, "norm", lambda states: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                model(ids[:, 5:6], past_key_values=cache)
        model(ids[:, 6:], past_key_values=cache)
        twin(ids[:, 6:], past_key_values=other)
    for layer_idx in range(6):
        for found, wanted in zip(cache.keys_values(layer_idx), other.keys_values(layer_idx), strict=True):
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_prompts_read_under_inference_mode_can_be_continued_outside(network):
    model = deferred(network, "random:p=0.7,protect=0 0")
    cache = model.new_cache()
    with torch.inference_mode():
        for t in range(4):
            model(tokens()[:, t : t + 1], past_key_values=cache)
    with torch.no_grad():
        model(tokens()[:, 4:5], past_key_values=cache)
    cache.rollback(1)
    assert cache.seen == 4


@pytest.mark.parametrize(("weights", "share", "off"), [("int8", 0.5, 0.05), ("int4", 0.5, 0.5)])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt-neox", "qwen3"])
def test_quantised_weights(family, weights, share, off):
    network = build(family)
    exact = adaptive(copy.deepcopy(network), fast=False)
    size = sum(p.numel() for p in network.parameters() if p.dim() == 2)
    fast = adaptive(network, "random:p=0.3,protect=0 0", weights=weights)
    slow = adaptive(network, "random:p=0.3,protect=0 0", fast=False)
    ids, mask = ragged((7, 4), "left")
    with torch.no_grad():
        torch.testing.assert_close(fast(ids, mask).logits, slow(ids, mask).logits, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(logits_of(fast, ids), logits_of(slow, ids), atol=1e-4, rtol=1e-3)
    assert fast.slow_because is None
    each = {torch.int8: 1, torch.uint8: 2}
    stored = sum(b.numel() * each.get(b.dtype, 0) for b in network.buffers())
    outside = network.get_input_embeddings().weight.numel() + network.get_output_embeddings().weight.numel()
    assert stored >= (size - outside) * 0.9
    bytes_read = sum(work.weight_bytes for work in fast.engine.costs.run)
    assert bytes_read < share * sum(work.weight_bytes for work in exact.engine.costs.run)
    dense = adaptive(network)
    with torch.no_grad():
        gap = (dense(ids, mask).logits - exact(ids, mask).logits)[mask.bool()].std()
        assert 0 < gap < off * exact(ids, mask).logits.std()


def test_weights_that_int4_can_hold_stay_as_they_are():
    steps = torch.arange(96).reshape(3, 32) * 7 % 16
    steps[:, :2] = torch.tensor([0, 15])
    weight = steps * 0.25 - torch.tensor([[1.0], [2.0], [3.0]])
    assert torch.equal(Int4Linear(weight, None).dequantised(), weight)


def test_what_cannot_be_quantised_is_an_error():
    with pytest.raises(ModelError, match="multiple of 32 inputs; got 24"):
        Int4Linear(torch.zeros(5, 24), None)
    with pytest.raises(InputError, match="can be quantised to int8, int4; got 'int3'"):
        anee.load(build("llama"), weights="int3")
    with pytest.raises(ModelError, match="experts"):
        anee.load(build("mixtral"), weights="int8")
