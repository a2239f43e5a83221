"""Every built-in family, in every variant, and every built-in policy keep the promises of the conformance suites."""

import copy

import pytest
import torch
from tiny import CONFIGS, FAMILIES, PLUGINS, adaptive, build, stepwise, tokens
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    GPT2Config,
    GraniteMoeHybridConfig,
    Llama4TextConfig,
    MambaConfig,
    MiniMaxConfig,
    MptConfig,
    T5Config,
)

import anee
from anee_adapters import LlamaAdapter, anee_adapters
from anee_core.conformance.check import named
from anee_core.conformance.subject import Subject
from anee_core.conformance.suite import ADAPTER_CHECKS, PolicyConformance
from anee_core.conformance.tiny import read_configs, small_config
from anee_core.errors import AdapterError, InputError, ModelError
from anee_core.model import AdaptiveModel

REFUSED = {
    "falcon": (FalconConfig(alibi=True),),
    "gemma3_text": (Gemma3TextConfig(use_bidirectional_attention=True),),
    "gpt2": (GPT2Config(add_cross_attention=True),),
}


def shallow(config):
    """Return a config with four layers, the fewest that the checks take; among them is every kind that it has."""
    config = copy.deepcopy(config)
    config.num_hidden_layers = 4
    if getattr(config, "layer_types", None):
        assert set(config.layer_types[:4]) == set(config.layer_types)
        config.layer_types = config.layer_types[:4]
    return config


@pytest.fixture(scope="module")
def subjects():
    """Models are shared by the checks of a config, and let go with the next."""
    made = {}

    def subject(name):
        if name not in made:
            made.clear()
            config = shallow(CONFIGS[name])
            kind = config.model_type
            made[name] = Subject(PLUGINS.adapters[kind], config, name, REFUSED.get(kind, ()), PLUGINS)
        return made[name]

    return subject


@pytest.mark.parametrize("check", ADAPTER_CHECKS, ids=[check.name for check in ADAPTER_CHECKS])
@pytest.mark.parametrize("name", FAMILIES)
def test_family(name, check, subjects):
    failure = check.failure(subjects(name))
    assert failure is None, failure


SHORT = ("paths", "window", "dense sequence", "keys and values", "cost model")
"""Checks that show most mistakes in a table, in little time; `make conformance` runs all on every config."""


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in FAMILIES])
def test_short_checks_of_the_other_families(name, subjects):
    for check in named(ADAPTER_CHECKS, SHORT):
        failure = check.failure(subjects(name))
        assert failure is None, failure


class TestPolicies(PolicyConformance):
    policies = {
        "dense": ("dense", None),
        "static": ("static:skip=1 3", None),
        "static, calibrated": ("static:protect=1 1", 0.7),
        "random": ("random:protect=1 1", 0.7),
        "random, exit": ("random:p=0.3,exit=0.2,protect=1 1", None),
        "heuristic": ("heuristic:protect=1 1,exit=0.3,spread=0.2", 0.7),
        "window": ("window:sinks=1,recent=4", None),
        "heuristic and window": ("heuristic:protect=1 1+window:sinks=1,recent=4", 0.7),
    }


def test_every_registered_family_has_a_config_and_every_config_an_adapter():
    assert {config.model_type for config in CONFIGS.values()} == set(anee_adapters())


@pytest.mark.parametrize("kind", sorted(anee_adapters()))
def test_default_config_of_every_family_can_be_made_small(kind):
    config = small_config(kind)
    assert (config.num_hidden_layers, config.hidden_size) == (6, 32)


def test_positions_beyond_longrope_short_factors_are_refused():
    """Beyond them transformers turns cached keys no more as it turned them before."""
    model = adaptive(AutoModelForCausalLM.from_config(CONFIGS["phi3-longrope"]))
    assert model(tokens(1, 64)).logits.shape[1] == 64
    with pytest.raises(InputError, match="context of 64"):
        model(tokens(1, 65))


def test_dynamic_scaling_is_refused_beyond_the_trained_length_only():
    config = type(CONFIGS["llama"])(**{**CONFIGS["llama"].to_dict(), "max_position_embeddings": 16})
    config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(config).eval()
    model, ids = adaptive(network), tokens(1, 16)
    assert torch.equal(model(ids).logits, network(ids).logits)
    with pytest.raises(InputError, match="context of 16"):
        model(tokens(1, 17))


def test_rotary_positions_without_such_an_end_go_on():
    config = type(CONFIGS["llama"])(**{**CONFIGS["llama"].to_dict(), "max_position_embeddings": 16})
    assert adaptive(AutoModelForCausalLM.from_config(config))(tokens(1, 17)).logits.shape[1] == 17


def test_table_of_positions_inside_attention_ends_too():
    model = adaptive(AutoModelForCausalLM.from_config(CONFIGS["gptj"]))
    with pytest.raises(InputError, match="context of 128"):
        model(tokens(1, 129))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (MambaConfig(vocab_size=97, hidden_size=16, num_hidden_layers=2, state_size=4), "keep no key/value cache"),
        (T5Config(vocab_size=97, d_model=16, num_layers=1, num_heads=2, d_kv=8, d_ff=16), "encoder"),
        (BloomConfig(vocab_size=97, hidden_size=16, n_layer=2, n_head=2), "ALiBi"),
        (MptConfig(vocab_size=97, d_model=16, n_layers=2, n_heads=2), "ALiBi"),
        (Llama4TextConfig(), "its own chunk only"),
        (Gemma3nTextConfig(), "num_kv_shared_layers=15: layers attend to what others stored"),
        (Gemma3nTextConfig(num_kv_shared_layers=0), "=256: each layer is given an embedding of its own"),
        (MiniMaxConfig(), "'linear_attention' keep no key/value cache"),
    ],
    ids=["mamba", "t5", "bloom", "mpt", "chunks", "shared", "embeddings", "linear"],
)
def test_families_that_no_adapter_could_serve_are_refused_with_the_reason(config, reason, tmp_path):
    config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=reason):
        anee.load(str(tmp_path))


def test_family_with_state_space_layers_is_refused_unless_its_config_has_none():
    refused = anee_adapters()["granitemoehybrid"].refuse
    assert "keep no key/value cache" in refused(GraniteMoeHybridConfig())
    assert refused(CONFIGS["granitemoehybrid"]) is None


def test_attention_that_folds_heads_into_rows_is_seen_by_token_policies():
    model = adaptive(build("xglm"), "tova:keep=4")
    ids = tokens(3)
    with torch.no_grad():
        whole, steps = model(ids).logits, stepwise(model, ids)
        alone = torch.cat([model(row[None]).logits for row in ids])
    torch.testing.assert_close(whole, steps, atol=5e-5, rtol=1e-3)
    torch.testing.assert_close(whole, alone, atol=5e-5, rtol=1e-3)


def test_configs_of_families_that_transformers_does_not_have_yet_are_left_out_of_a_folder(tmp_path, caplog):
    (tmp_path / "known.json").write_text('{"model_type": "llama"}')
    (tmp_path / "later.json").write_text('{"model_type": "llama99"}')
    assert list(read_configs(tmp_path)) == ["known"]
    assert caplog.messages[-1].endswith("has no such families: later")
    with pytest.raises(InputError, match="unknown family 'llama99'"):
        read_configs(tmp_path / "later.json")
    (tmp_path / "known.json").unlink()
    with pytest.raises(InputError, match=r"has no \.json config of a family that transformers has"):
        read_configs(tmp_path)


def changed(name, **options):
    """Return a config of ``tests/configs`` with other options."""
    return type(CONFIGS[name])(**{**CONFIGS[name].to_dict(), **options})


@pytest.mark.parametrize(
    "config",
    [
        changed("llama", sliding_window=3),
        changed("gpt-neox", sliding_window=3),
        changed("mistral", layer_types=["full_attention", "sliding_attention"] * 3),
        changed("phi3-sliding", layer_types=["full_attention"] * 6),
    ],
    ids=["llama", "gpt-neox", "mistral", "phi3"],
)
def test_window_is_what_the_family_makes_of_its_config(config):
    """Some families ignore ``sliding_window``, some ``layer_types``."""
    torch.manual_seed(0)
    network, ids = AutoModelForCausalLM.from_config(config).eval(), tokens()
    with torch.no_grad():
        torch.testing.assert_close(adaptive(network)(ids).logits, network(ids).logits)


def test_window_of_which_an_adapter_knows_nothing_is_refused():
    """Such a model would agree with transformers up to the window, and go astray beyond it."""
    network = AutoModelForCausalLM.from_config(CONFIGS["mistral"])
    with pytest.raises(ModelError, match="sliding_window=5, but LlamaAdapter gives no layer a window: name its layers"):
        AdaptiveModel(network, LlamaAdapter())
    full = AutoModelForCausalLM.from_config(CONFIGS["mistral-full"])
    assert AdaptiveModel(full, LlamaAdapter())(tokens()).logits.shape[1] == 11
    unused = AutoModelForCausalLM.from_config(changed("qwen2", sliding_window=5, use_sliding_window=False))
    assert AdaptiveModel(unused, LlamaAdapter())(tokens()).logits.shape[1] == 11


def test_attention_to_the_future_is_refused():
    config = changed("llama")
    config.is_causal = False
    with pytest.raises(ModelError, match="is_causal=False lets tokens see the future"):
        anee.load(AutoModelForCausalLM.from_config(config))


def test_given_position_that_does_not_exist_is_refused():
    model = adaptive(AutoModelForCausalLM.from_config(CONFIGS["gpt2"]))
    with pytest.raises(InputError, match=r"position 128 lies beyond the model.s context of 128 tokens"):
        model(tokens(1, 2), position_ids=torch.tensor([[0, 128]]))


def test_family_with_recurrent_layers_is_refused_with_the_reason_when_loaded():
    config = MambaConfig(vocab_size=97, hidden_size=16, num_hidden_layers=2, state_size=4)
    with pytest.raises(ModelError, match="keep no key/value cache"):
        anee.load(AutoModelForCausalLM.from_config(config))


def test_falcon_with_alibi_is_refused_with_the_reason():
    config = type(CONFIGS["falcon-sequential"])(**{**CONFIGS["falcon-sequential"].to_dict(), "alibi": True})
    with pytest.raises(ModelError, match="ALiBi bias from the padding mask"):
        anee.load(AutoModelForCausalLM.from_config(config))


def test_stacked_weights_that_no_path_names_are_refused():
    """Otherwise a mixture of experts would be charged for its router alone."""
    with pytest.raises(AdapterError, match=r"'mlp\.experts' of MixtralDecoderLayer holds stacked weights"):
        AdaptiveModel(AutoModelForCausalLM.from_config(CONFIGS["mixtral"]), LlamaAdapter())


def test_a_token_reads_its_own_experts_and_many_tokens_read_all():
    model = adaptive(AutoModelForCausalLM.from_config(CONFIGS["mixtral"]))
    layer = model.engine.costs.run[0]
    experts = model.parts.layers[0].mlp.experts
    held = sum(p.numel() * p.element_size() for p in experts.parameters())
    assert layer.table_bytes == held
    assert layer.token_bytes * 2 == held  # 2 of 4 experts
    everything = sum(p.numel() * p.element_size() for p in model.parts.layers[0].parameters())
    assert layer.read(0) == 0
    assert layer.read(1) == everything - held // 2
    assert layer.read(50) == everything
