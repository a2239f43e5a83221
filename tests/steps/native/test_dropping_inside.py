"""Tokens dropped inside the native step: the same decisions, slots and numbers as layer by layer."""

import pytest
import torch
from tiny import FEW, adaptive, build, gate_weights, ragged, stepwise, tokens

from anee_core.cache_policies.asa import AsaCachePolicy, AsaWeights
from anee_core.errors import CheckpointError
from anee_core.policy import Policy
from anee_core.steps.deferred import DeferredStep
from anee_core.steps.native.step import NativeStep

RANK = 5
LAYER_POLICIES = {"dense": ("dense", None), "random": ("random:p=0.4,protect=0 0", None), "gate": ("gate", 0.7)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with an asa that drops about half, a gate and shortcuts."""
    folder = tmp_path_factory.mktemp("learned")
    torch.manual_seed(0)
    beta = torch.tensor([4.0, -2.0, 2.0, 6.0, 1.0, -20.0])
    AsaWeights(torch.randn(6, RANK, 32), torch.randn(6, RANK, 32), beta).save(folder)
    for part in gate_weights():
        part.save(folder)
    return folder


@pytest.fixture
def taken(note_stacks):
    """Return a list that grows with each block whose tokens are dropped in one call."""
    return note_stacks(lambda stack: stack.dropping is not None)


def both(family, layers, folder, dtype=torch.float32):
    """Return the same model by the native step and by its modules."""
    policy, budget = LAYER_POLICIES[layers]
    policy = f"gate:{folder},protect=1 1+shortcuts:{folder}" if policy == "gate" else policy
    network = build(family, dtype=dtype)
    return [adaptive(network, f"{policy}+asa:{folder}", budget, fast=fast) for fast in (True, False)]


@pytest.mark.parametrize("family", [family for family in FEW if family != "qwen2-sliding"])
@pytest.mark.parametrize("layers", list(LAYER_POLICIES))
def test_it_drops_what_the_modules_drop(family, layers, folder, taken):
    fast, slow = both(family, layers, folder)
    new = tokens(3, 20, seed=6)  # no two scores that only rounding tells apart
    for prompt, mask in ((tokens(3, 9), None), ragged((9, 5, 7), "left")):
        logits, caches = [], []
        with torch.inference_mode():
            for model in (fast, slow):
                cache = model.new_cache()
                with model.recording(cache) as trace:
                    model(prompt, mask, past_key_values=cache)
                    steps = [model(new[:, t : t + 1], past_key_values=cache).logits for t in range(20)]
                logits.append(torch.cat(steps, dim=1))
                caches.append((cache, trace))
        torch.testing.assert_close(*logits, atol=5e-5, rtol=1e-3)
        (cache, found), (other, wanted) = caches
        assert torch.equal(found.ran, wanted.ran)
        assert torch.equal(found.held, wanted.held)
        assert torch.equal(cache.kept(), other.kept())
        assert torch.equal(found.kv_bytes_by_step, wanted.kv_bytes_by_step)
        assert found.spent().policy_flops == wanted.spent().policy_flops
    assert taken == [1] * 40
    assert 0.2 < found.context_dropped < 0.97


def test_windows_and_derived_policies_go_layer_by_layer(folder, taken):
    class Other(AsaCachePolicy):
        name = "other"

        def retain(self, view):
            return ~super().retain(view)

    network = build("llama")
    fast, slow = both("qwen2-sliding", "dense", folder)
    with torch.no_grad():
        torch.testing.assert_close(stepwise(fast, tokens()), stepwise(slow, tokens()), atol=2e-5, rtol=1e-4)
        fast, slow = (adaptive(network, Policy(cache_policy=Other(str(folder))), fast=fast) for fast in (True, False))
        torch.testing.assert_close(stepwise(fast, tokens()), stepwise(slow, tokens()), atol=2e-5, rtol=1e-4)
    assert taken == []


def test_what_was_dropped_comes_back(folder, taken):
    ids = tokens(2, 16)
    found = []
    with torch.no_grad():
        for model in both("llama", "random", folder):
            cache = model.new_cache()
            cache.activate_past_recording()
            for t in range(12):
                model(ids[:, t : t + 1], past_key_values=cache)
            before = cache.kept()
            cache.rollback(5)
            assert (cache.kept() != before).any()
            cache.reorder_cache(torch.tensor([1, 1]))
            for t in range(7, 16):
                logits = model(ids[:, t : t + 1], past_key_values=cache).logits
            found.append((logits, cache.kept(), [slots.died for slots in cache.slots]))
    torch.testing.assert_close(*found, atol=2e-5, rtol=1e-4)
    assert len(taken) == 21


@pytest.mark.parametrize("layers", ["random", "gate"])
def test_beams(layers, folder, taken):
    ids, options = tokens(2, 6), {"num_beams": 3, "max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(*(model.generate(ids, **options) for model in both("gpt2", layers, folder)))
    assert taken


def test_keys_and_values_may_come_later(folder):
    policy = f"static:skip=1 2 4+asa:{folder}"
    network = build("llama")
    slow, fast = adaptive(network, policy, fast=False), adaptive(network, policy)
    step = DeferredStep(NativeStep(fast.adapter, fast.parts))
    fast.use_step(step)
    with torch.no_grad():
        torch.testing.assert_close(stepwise(fast, tokens(3, 25)), stepwise(slow, tokens(3, 25)), atol=2e-5, rtol=1e-4)


def test_bfloat16(folder, taken):
    # Decisions near the edge may differ, so that only what is the same can be compared: nothing near it is here.
    fast, slow = both("gpt2", "dense", folder, torch.bfloat16)
    weights = AsaWeights(torch.zeros(6, RANK, 32), torch.zeros(6, RANK, 32), torch.tensor([1.0, -1, 1, -1, 1, -1]))
    for model in (fast, slow):
        model.set_policy(Policy(cache_policy=AsaCachePolicy.of(weights)))
    with torch.no_grad():
        found, wanted = (stepwise(model, tokens(5, 9)).float() for model in (fast, slow))
    torch.testing.assert_close(found, wanted, atol=0.06, rtol=0.02)
    assert fast.last_trace.kept.tolist() == slow.last_trace.kept.tolist() == [[9] * 5, [1] * 5] * 3
    assert len(taken) == 9


def test_weights_in_memory_need_no_folder_and_are_not_saved(tmp_path):
    weights = AsaWeights(torch.zeros(6, RANK, 32), torch.zeros(6, RANK, 32), -torch.ones(6))
    model = adaptive(build("llama"), Policy(cache_policy=AsaCachePolicy.of(weights)))
    model(tokens())
    assert model.last_trace.kept.tolist() == [[1, 1]] * 6
    with pytest.raises(CheckpointError, match="asa has weights in memory: save those to a folder"):
        model.policy.save(tmp_path / "policy")
    weights.save(tmp_path / "asa")
    assert adaptive(build("llama"), f"asa:{tmp_path / 'asa'}").policy.untrained() == frozenset()
