"""Loading: from folders, from models in memory, wrapped or quantised, without leaving a mark on any of them."""

import copy
import json
import shutil
import subprocess
import sys

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import anee
from anee.wrapper import ANEEWrapper
from anee_core.calibration import CalibrationOptions
from anee_core.calibration.fingerprint import fingerprint
from anee_core.errors import AneeError, InputError, ModelError

IDS = torch.randint(2, 97, (2, 11), generator=torch.Generator().manual_seed(0))
QUICK = CalibrationOptions(sequences=1, length=8, progress=False)


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def without_layers(model, skip):
    """Return a copy of a transformers model that lacks some layers."""
    shorter = copy.deepcopy(model)
    owner, name = (shorter.transformer, "h") if hasattr(shorter, "transformer") else (shorter.model, "layers")
    setattr(owner, name, nn.ModuleList(layer for i, layer in enumerate(getattr(owner, name)) if i not in skip))
    shorter.config.num_hidden_layers = len(getattr(owner, name))
    return shorter


def skipping_equals_removing(model, network):
    """Check a model under ``static:skip=1 2`` against its network without these layers."""
    expected = without_layers(network, {1, 2})(IDS, use_cache=False).logits
    torch.testing.assert_close(model(IDS).logits, expected)
    assert not torch.equal(expected, network(IDS).logits)


# From where.


def test_local_folder_gives_the_model_and_its_tokenizer(llama_folder, tiny_llama, word_tokenizer):
    for folder in (llama_folder, str(llama_folder)):
        model = anee.load(folder, fast=False)
        assert torch.equal(model(IDS).logits, tiny_llama(IDS).logits)
        assert model.tokenizer.get_vocab() == word_tokenizer.get_vocab()
        assert not model.training
        assert not model.model.training


def test_local_folder_with_a_policy_skips(llama_folder, tiny_llama):
    skipping_equals_removing(anee.load(llama_folder, "static:skip=1 2"), tiny_llama)


def test_loaded_model_is_used_and_not_copied(tiny_llama, tiny_gpt2):
    for network in (tiny_llama, tiny_gpt2):
        model = anee.load(network, fast=False)
        assert model.model is network
        assert model.tokenizer is None
        assert torch.equal(model(IDS).logits, network(IDS).logits)
        skipping_equals_removing(anee.load(network, "static:skip=1 2"), network)


def test_tokenizer_can_come_with_a_loaded_model_or_replace_the_folders(tiny_llama, llama_folder, word_tokenizer):
    assert anee.load(tiny_llama, tokenizer=word_tokenizer).generate("Hello", max_new_tokens=3).text.startswith("Hello")
    assert anee.load(llama_folder, tokenizer=word_tokenizer).tokenizer is word_tokenizer


def test_text_without_a_tokenizer_is_refused(tiny_llama):
    with pytest.raises(InputError, match=r"text needs a tokenizer: pass one to anee\.load"):
        anee.load(tiny_llama).generate("Hello")


@pytest.fixture
def hub_cache(llama_folder, tiny_gpt2, word_tokenizer, tmp_path):
    """A cache as the hub's client leaves it, with two revisions of one repository: a Llama, and on ``old`` a GPT-2."""
    repository = tmp_path / "models--someone--tiny"
    commits = {"main": "a" * 40, "old": "b" * 40}
    shutil.copytree(llama_folder, repository / "snapshots" / commits["main"])
    tiny_gpt2.save_pretrained(repository / "snapshots" / commits["old"])
    (repository / "refs").mkdir()
    for name, commit in commits.items():
        (repository / "refs" / name).write_text(commit)
    return tmp_path


def test_hub_id_is_found_where_the_options_say(hub_cache, tiny_llama, tiny_gpt2):
    """The options hold for the config and the tokenizer as for the weights."""
    model = anee.load("someone/tiny", cache_dir=hub_cache, fast=False)
    assert torch.equal(model(IDS).logits, tiny_llama(IDS).logits)
    assert model.tokenizer is not None
    old = anee.load("someone/tiny", cache_dir=hub_cache, revision="old", fast=False)
    assert torch.equal(old(IDS).logits, tiny_gpt2(IDS).logits)
    assert old.tokenizer is None
    with pytest.raises(ModelError, match="cannot find the model 'someone/tiny'"):
        anee.load("someone/tiny")


def test_model_in_a_subfolder_is_found(llama_folder, tiny_llama, tmp_path):
    shutil.copytree(llama_folder, tmp_path / "inner")
    model = anee.load(tmp_path, subfolder="inner", fast=False)
    assert torch.equal(model(IDS).logits, tiny_llama(IDS).logits)
    assert model.tokenizer is not None


def test_options_reach_transformers(llama_folder):
    assert anee.load(llama_folder, attn_implementation="eager").config._attn_implementation == "eager"


# What is refused.


@pytest.mark.parametrize("thing", [nn.Linear(2, 2), nn.Sequential()])
def test_other_modules_are_refused(thing):
    with pytest.raises(ModelError, match=f"a model is a transformers causal LM; got {type(thing).__name__}"):
        anee.load(thing)


def test_model_without_a_head_is_refused(tiny_llama, tiny_gpt2):
    for body in (tiny_llama.model, tiny_gpt2.transformer):
        with pytest.raises(anee.AneeError):
            anee.load(body)


@pytest.mark.parametrize("option", ["polcy", "attn_implementation", "revision"])
def test_option_that_a_loaded_model_cannot_take_is_refused(tiny_llama, option):
    with pytest.raises(InputError, match=f"unknown option '{option}'"):
        anee.load(tiny_llama, **{option: "static:skip=1"})


def test_misspelt_option_for_a_folder_is_refused(llama_folder):
    with pytest.raises(ModelError, match="polcy"):
        anee.load(llama_folder, polcy="static:skip=1")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "statik"}, "unknown policy 'statik'"),
        ({"budget": 2.0}, r"lies in \(0, 1\]"),
        ({"dtype": "bf16"}, r"unknown dtype 'bf16'; did you mean 'bfloat16'\?"),
        ({"dtype": torch.int8}, r"a model runs in a floating-point dtype; got torch\.int8"),
        ({"device": "toaster"}, "device 'toaster' cannot be used"),
        ({"device": torch.device("cuda", 99)}, "device 'cuda:99' cannot be used"),
    ],
)
def test_wrong_option_shows_before_anything_is_loaded(monkeypatch, llama_folder, options, message):
    def fail(*_, **__):
        raise AssertionError("no file is read for a call that cannot succeed")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", fail)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", fail)
    with pytest.raises(anee.AneeError, match=message) as caught:
        anee.load(llama_folder, **options)
    assert "\n" not in str(caught.value)


def test_weights_of_a_loaded_model_are_checked(tiny_llama):
    broken = copy.deepcopy(tiny_llama)
    broken.model.layers[1].mlp.up_proj.weight[3, 4] = float("inf")
    with pytest.raises(ModelError, match=r"weight 'model\.layers\.1\.mlp\.up_proj\.weight' holds NaN or infinity"):
        anee.load(broken)


def test_budget_that_cannot_be_met_shows_before_calibration(tiny_llama, monkeypatch):
    def fail(*_, **__):
        raise AssertionError("calibration may take minutes")

    monkeypatch.setattr("anee_core.load.calibrate", fail)
    with pytest.raises(anee.AneeError, match=r"a budget of 0\.2 cannot be met: the least possible is"):
        anee.load(tiny_llama, "heuristic:protect=1 1", 0.2)


# Half precision.


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", ["tiny_llama", "tiny_gpt2"])
def test_half_precision_equals_transformers_own(request, family, name):
    network = copy.deepcopy(request.getfixturevalue(family)).to(getattr(torch, name))
    model = anee.load(network, fast=False)
    assert model.dtype == network.dtype
    assert torch.equal(model(IDS).logits, network(IDS).logits)
    expected = without_layers(network, {1, 2})(IDS, use_cache=False).logits
    torch.testing.assert_close(anee.load(network, "static:skip=1 2", fast=False)(IDS).logits, expected)


@pytest.mark.parametrize("given", ["bfloat16", torch.bfloat16, "float16"])
def test_dtype_is_that_asked_for(llama_folder, given):
    model = anee.load(llama_folder, dtype=given, fast=False)
    wanted = getattr(torch, given) if isinstance(given, str) else given
    assert {p.dtype for p in model.model.parameters()} == {wanted}
    expected = AutoModelForCausalLM.from_pretrained(llama_folder, dtype=wanted)(IDS).logits
    assert torch.equal(model(IDS).logits, expected)


def test_dtype_is_that_stored_unless_asked(tiny_llama, tmp_path):
    copy.deepcopy(tiny_llama).to(torch.bfloat16).save_pretrained(tmp_path)
    assert anee.load(tmp_path).dtype == torch.bfloat16
    assert anee.load(tmp_path, dtype="float32").dtype == torch.float32


# Wrapped by PEFT.


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
    skipping_equals_removing(model, wrapped.get_base_model())
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


# Quantised.


@pytest.fixture(params=["tiny_llama", "tiny_gpt2"])
def quantised(request):
    """A model with int8 weights in every linear layer (GPT-2 has but one: the rest is transposed)."""
    torchao = pytest.importorskip("torchao.quantization")
    network = copy.deepcopy(request.getfixturevalue(request.param))
    torchao.quantize_(network, torchao.Int8WeightOnlyConfig())
    assert any(type(parameter) is not nn.Parameter for parameter in network.parameters())
    return network


def test_quantised_model_gives_its_own_logits(quantised):
    assert torch.equal(anee.load(quantised)(IDS).logits, quantised(IDS).logits)


def test_quantised_model_skips_and_saves(quantised):
    model = anee.load(quantised, "static:skip=1 2")
    skipping_equals_removing(model, quantised)
    assert model.last_trace.budget_spent < 0.65
    weights = model.last_trace.weight_bytes
    assert weights["spent"] < weights["dense"]
    sequences = model.decode(IDS, max_new_tokens=5).sequences
    chosen = model(sequences[:, :-1]).logits.argmax(-1)
    assert torch.equal(chosen[:, IDS.shape[1] - 1 :], sequences[:, IDS.shape[1] :])


def test_quantised_model_calibrates_and_is_told_from_others(quantised):
    def load(network):
        return anee.load(network, "heuristic:protect=1 1", 0.7, calibration=QUICK).policy.calibration

    found = load(quantised)
    assert found.importance.isfinite().all()
    assert load(quantised).fingerprint == found.fingerprint
    torchao = pytest.importorskip("torchao.quantization")
    other = type(quantised)(quantised.config).eval()
    torchao.quantize_(other, torchao.Int8WeightOnlyConfig())
    assert load(other).fingerprint != found.fingerprint


def test_weights_of_different_precision_are_told_apart(tiny_llama):
    networks = {weights: copy.deepcopy(tiny_llama) for weights in (None, "int8", "int4")}
    prints = {weights: fingerprint(anee.load(network, weights=weights)) for weights, network in networks.items()}
    assert len(set(prints.values())) == 3


def test_what_is_not_plain_is_not_quantised_and_stays_as_it_was(tiny_llama):
    small = copy.deepcopy(tiny_llama)
    anee.load(small, weights="int8")
    with pytest.raises(ModelError, match="is quantised, wrapped or hooked already"):
        anee.load(small, weights="int4")
    odd = copy.deepcopy(tiny_llama)
    odd.model.layers[-1].mlp.down_proj = nn.Linear(33, odd.config.hidden_size)  # int4 takes multiples of 32
    with pytest.raises(AneeError):
        anee.load(odd, weights="int4")
    assert all(type(module) is nn.Linear for name, module in odd.named_modules() if name.endswith("_proj"))


def test_the_hub_gets_model_and_policy_each_by_itself(tiny_llama):
    with pytest.raises(InputError, match="anee publish"):
        anee.load(tiny_llama, "static:skip=1").push_to_hub("somebody/name")


# The first system's front door.


@pytest.fixture(scope="module")
def deep_folder(tmp_path_factory, tiny_llama, word_tokenizer):
    """A model with eight layers: the default policy protects four."""
    config = copy.deepcopy(tiny_llama.config)
    config.num_hidden_layers = 8
    torch.manual_seed(2)
    folder = tmp_path_factory.mktemp("deep")
    type(tiny_llama)(config).save_pretrained(folder)
    word_tokenizer.save_pretrained(folder)
    return folder


def test_wrapper_generates_text_under_a_given_policy(llama_folder, word_tokenizer):
    config = anee.ANEEConfig(model_name=str(llama_folder), energy_budget=0.8, policy="static:skip=1")
    wrapper = ANEEWrapper(config).eval()
    text = wrapper.generate(tokenizer=word_tokenizer, prompt="Hello", max_new_tokens=6)
    assert text == anee.load(llama_folder, "static:skip=1").generate("Hello", max_new_tokens=6).text
    assert wrapper.model.last_trace.layers_run == 0.75
    assert wrapper.config is config


def test_wrapper_generates_text_under_the_default_policy_and_meets_the_budget(deep_folder):
    wrapper = ANEEWrapper(anee.ANEEConfig(model_name=str(deep_folder), energy_budget=0.7)).eval()
    text = wrapper.generate(prompt="Hello", max_new_tokens=30)
    assert text.startswith("Hello")
    assert str(wrapper.model.policy) == "heuristic"
    assert wrapper.model.budget == 0.7
    assert wrapper.model.last_trace.budget_spent == pytest.approx(0.7, abs=0.03)


def test_wrapper_passes_device_dtype_and_generation_options_on(llama_folder):
    config = anee.ANEEConfig(
        model_name=str(llama_folder), policy="dense", energy_budget=1.0, dtype="bfloat16", device="cpu"
    )
    wrapper = ANEEWrapper(config)
    assert wrapper.model.dtype == torch.bfloat16
    options = {"do_sample": True, "top_k": 40, "max_new_tokens": 12}
    assert wrapper.generate("Hello", seed=1, **options) == wrapper.generate("Hello", seed=1, **options)
    assert wrapper.generate("Hello", seed=1, **options) != wrapper.generate("Hello", seed=2, **options)


def test_wrapper_refuses_a_budget_below_the_least_possible(llama_folder):
    with pytest.raises(anee.AneeError, match=r"a budget of 0\.2 cannot be met: the least possible is"):
        ANEEWrapper(anee.ANEEConfig(model_name=str(llama_folder), energy_budget=0.2))


# No mark is left.


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


def test_nothing_of_transformers_is_changed(llama_folder):
    """In a process of its own, for the one that runs the tests has loaded models before."""
    script = f"""
import json
import transformers.cache_utils as cache_utils
import transformers.masking_utils as masking_utils
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama
from transformers.models.gpt2 import modeling_gpt2

def snapshot():
    owners = (
        cache_utils, masking_utils, modeling_llama, modeling_gpt2, GenerationMixin, PreTrainedModel, LlamaForCausalLM,
        modeling_llama.LlamaModel, modeling_llama.LlamaDecoderLayer, modeling_llama.LlamaAttention,
        cache_utils.DynamicCache, cache_utils.DynamicLayer, cache_utils.Cache,
    )
    return {{
        "attention": sorted(ALL_ATTENTION_FUNCTIONS.valid_keys()),
        "masks": sorted(masking_utils.ALL_MASK_ATTENTION_FUNCTIONS.valid_keys()),
        "cache layers": sorted((k, v.__name__) for k, v in cache_utils.DYNAMIC_LAYER_TYPE_MAPPING.items()),
        "static cache layers": sorted((k, v.__name__) for k, v in cache_utils.STATIC_LAYER_TYPE_MAPPING.items()),
        "models": len(AutoModelForCausalLM._model_mapping._extra_content),
        **{{owner.__name__: {{k: id(v) for k, v in vars(owner).items()}} for owner in owners}},
    }}

# transformers notes some things on its classes at first use; that is not counted.
transformed = AutoModelForCausalLM.from_pretrained({str(llama_folder)!r})
transformed.generate(**transformed.dummy_inputs, max_new_tokens=2, num_beams=2, do_sample=False)

before = snapshot()
import anee
model = anee.load({str(llama_folder)!r}, "random:p=0.5,protect=1 1+window:recent=4")
model.generate("Hello you", max_new_tokens=4)
model.generate(**model.tokenizer("Hello", return_tensors="pt"), max_new_tokens=4, num_beams=2, do_sample=False)
after = snapshot()
changed = [f"{{k}}: {{n}}" for k in before if isinstance(before[k], dict)
           for n in before[k].keys() | after[k].keys() if before[k].get(n) != after[k].get(n)]
changed += [k for k in before if not isinstance(before[k], dict) and before[k] != after[k]]
print(json.dumps(changed))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == []
