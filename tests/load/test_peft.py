"""Models wrapped by PEFT."""

import copy

import pytest
import torch
from tiny import QUICK, skipping_equals_removing

import anee
from anee_core.errors import ModelError

IDS = torch.randint(2, 97, (2, 11), generator=torch.Generator().manual_seed(0))


def lora(network, **options):
    """Return a PEFT model around a copy of a network, with adapters that matter."""
    peft = pytest.importorskip("peft")
    targets = ["c_attn", "c_fc"] if hasattr(network, "transformer") else ["q_proj", "k_proj", "v_proj", "up_proj"]
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=targets, r=4, **options)
    torch.manual_seed(1)
    wrapped = peft.get_peft_model(copy.deepcopy(network), config).eval()
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.normal_(std=0.3)
    return wrapped


@pytest.mark.parametrize("family", ["tiny_llama", "tiny_gpt2"])
def test_lora_model_gives_its_own_logits(request, family):
    network = request.getfixturevalue(family)
    wrapped = lora(network)
    model = anee.load(wrapped)
    expected = wrapped(IDS).logits
    assert torch.equal(model(IDS).logits, expected)
    assert (expected - network(IDS).logits).abs().max() > 0.05
    with wrapped.disable_adapter():
        assert torch.equal(model(IDS).logits, network(IDS).logits)


@pytest.mark.parametrize("family", ["tiny_llama", "tiny_gpt2"])
def test_lora_model_skips_and_its_skipped_layers_cache_what_lora_makes_of_them(request, family):
    wrapped = lora(request.getfixturevalue(family))
    model = anee.load(wrapped, "static:skip=1 2")
    skipping_equals_removing(model, wrapped.get_base_model(), IDS)
    merged = copy.deepcopy(wrapped).merge_and_unload()
    first = model.decode(IDS, max_new_tokens=6).sequences
    assert torch.equal(first, anee.load(merged, "static:skip=1 2").decode(IDS, max_new_tokens=6).sequences)
    caches = [m.new_cache() for m in (model, anee.load(merged, "static:skip=1 2"))]
    for cache, m in zip(caches, (model, anee.load(merged, "static:skip=1 2")), strict=True):
        m(IDS, past_key_values=cache)
    for layer in range(4):
        for mine, expected in zip(caches[0].keys_values(layer), caches[1].keys_values(layer), strict=True):
            torch.testing.assert_close(mine, expected)


def test_lora_model_calibrates(tiny_llama):
    model = anee.load(lora(tiny_llama), "heuristic:protect=1 1", 0.7, calibration=QUICK)
    plain = anee.load(tiny_llama, "heuristic:protect=1 1", 0.7, calibration=QUICK)
    assert model.policy.calibration.fingerprint != plain.policy.calibration.fingerprint
    assert not torch.equal(model.policy.calibration.importance, plain.policy.calibration.importance)


def test_peft_model_with_virtual_tokens_is_refused(tiny_llama):
    """They are put in front by the wrapper, which is not called: without them the output would be another."""
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(ModelError, match=r"adds virtual tokens .*; adapters inside the layers, such as LoRA, work"):
        anee.load(peft.get_peft_model(copy.deepcopy(tiny_llama), config))


def test_a_folder_that_peft_saved_is_its_base_model_adapted(tiny_llama, llama_folder, tmp_path):
    peft = pytest.importorskip("peft")
    wrapped = lora(type(tiny_llama).from_pretrained(llama_folder))
    wrapped.save_pretrained(tmp_path / "adapter")
    model = anee.load(tmp_path / "adapter", dtype="auto")
    torch.testing.assert_close(model(IDS).logits, wrapped(IDS).logits)
    assert not torch.allclose(model(IDS).logits, tiny_llama(IDS).logits, atol=1e-3)
    assert model.generate("Hello", max_new_tokens=2).text.startswith("Hello")
    assert peft is not None
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="does not say what model it adapts"):
        anee.load(tmp_path / "adapter")


def test_peft_model_that_is_activated_by_tokens_is_refused(tiny_llama):
    with pytest.raises(ModelError, match=r"works from its invocation tokens on \(activated LoRA\)"):
        anee.load(lora(tiny_llama, alora_invocation_tokens=[5, 6]))


def test_methods_of_the_wrapper_are_the_models(tiny_llama):
    wrapped = lora(tiny_llama)
    wrapped.add_adapter("two", type(wrapped.peft_config["default"])(target_modules=["k_proj"]))
    model = anee.load(wrapped)
    both = [wrapped(IDS).logits]
    model.set_adapter("two")
    assert wrapped.active_adapter == "two"
    both.append(model(IDS).logits)
    assert torch.equal(both[1], wrapped(IDS).logits)
    assert not torch.equal(*both)
    model.set_adapter("default")
    with model.disable_adapter():
        assert torch.equal(model(IDS).logits, tiny_llama(IDS).logits)
