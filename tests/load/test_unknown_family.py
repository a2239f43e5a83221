"""Families without an adapter: found by looking, checked, remembered, or refused with the line that failed."""

import pytest
import torch
from tiny import CONFIGS, build, tokens
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForSeq2SeqLM

import anee
from anee_core.adapter.guessed import GuessedAdapter, guess_layout
from anee_core.conformance import unknown_family
from anee_core.conformance.tiny import small_config, small_like
from anee_core.errors import InputError, ModelError
from anee_core.plugins import Plugins


@pytest.fixture
def bare(monkeypatch):
    """What is installed, without any adapter."""
    plugins = Plugins.discover()
    monkeypatch.setattr(plugins, "adapters", {})
    return plugins


PLAIN = ("gpt2", "gemma2", "mixtral")
"""Learned positions and dropout; windows in some layers and caps; experts."""


@pytest.mark.parametrize("family", PLAIN)
def test_a_family_without_an_adapter_runs(family, bare, caplog, anee_cache):
    network, ids = build(family), tokens(2, 20)
    model = anee.load(network, plugins=bare, fast=False)
    assert isinstance(model.adapter, GuessedAdapter)
    assert torch.equal(model(ids).logits, network(ids).logits)
    known = anee.load(network, "random:p=0.4,protect=0 0", fast=False)
    torch.testing.assert_close(
        anee.load(network, "random:p=0.4,protect=0 0", plugins=bare, fast=False)(ids).logits, known(ids).logits
    )
    said = [record.getMessage() for record in caplog.records if record.name == unknown_family.__name__]
    assert said[0].startswith(f"no adapter for the family '{network.config.model_type}': looking at a small model")
    assert said[1].endswith("runs as it looks, which passed 12 checks")
    assert len(list((anee_cache / "families").glob("*.json"))) == 1


def test_what_was_found_is_kept(bare, monkeypatch, anee_cache):
    network = build("llama")
    anee.load(network, plugins=bare)
    monkeypatch.setattr(unknown_family, "_look", None)
    monkeypatch.setattr(unknown_family, "check_real_weights", None)
    anee.load(network, plugins=bare)
    (kept,) = (anee_cache / "families").glob("*.json")
    kept.write_text("{")
    with pytest.raises(TypeError):  # it is looked at again
        anee.load(network, plugins=bare)


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("xglm", r"as it looks it cannot be run: layer arguments: expected 'hidden_states' of layer 0 bit for bit"),
        ("llama4_text", r"layers of the kind 'chunked_attention' let a token see its own chunk only"),
        ("bloom", r"places tokens by ALiBi"),
        ("t5", r"has an encoder"),
        ("mamba", r"keep no key/value cache that ANEE could share between tokens"),
    ],
)
def test_what_does_not_pass_is_refused_with_the_reason(family, message, bare):
    with pytest.raises(ModelError, match=message):
        anee.load(made(family), plugins=bare)


def made(family):
    """Return a small model of a family that ANEE cannot run."""
    if family in ("xglm", "llama4_text"):
        return AutoModelForCausalLM.from_config(small_config(family))
    config = CONFIG_MAPPING[family](vocab_size=97, num_hidden_layers=4, hidden_size=32, num_layers=4, d_model=32)
    kind = AutoModelForSeq2SeqLM if family == "t5" else AutoModelForCausalLM
    return kind.from_config(config)


def test_adapter_none_takes_registered_families_only(bare):
    with pytest.raises(ModelError, match="no adapter for the model family 'llama'"):
        anee.load(build("llama"), plugins=bare, adapter=None)
    assert anee.load(build("llama"), adapter=None)(tokens()).logits.shape == (2, 11, 97)


def test_an_adapter_may_be_given(bare):
    given = GuessedAdapter(guess_layout(build("llama")))
    assert anee.load(build("llama"), plugins=bare, adapter=given).adapter is given
    with pytest.raises(InputError, match="adapter is 'auto', None or an adapter object; got 'llama'"):
        anee.load(build("llama"), adapter="llama")


def test_real_weights_are_checked_too(bare, monkeypatch):
    network = build("llama")
    monkeypatch.setattr(unknown_family, "_kept", lambda place: unknown_family.Verdict(LAYOUT, None))
    monkeypatch.setattr(GuessedAdapter, "logits", lambda self, parts, states: parts.head(states) * 1.1)
    with pytest.raises(ModelError, match=r"computes something else on these weights: expected logits of 40 tokens"):
        anee.load(network, plugins=bare)


LAYOUT = {"layers": "model.layers", "final_norm": "model.norm", "rotary": "model.rotary_emb", "attention": "self_attn"}


def test_a_cache_that_cannot_be_written_costs_only_the_second_look(bare, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("ANEE_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(unknown_family, "_look", lambda config, plugins: unknown_family.Verdict(LAYOUT, None))
    anee.load(build("llama"), plugins=bare, fast=False)
    assert any("will be looked at again" in record.getMessage() for record in caplog.records)


def test_small_configs_keep_the_options_and_every_kind_of_layer():
    config = CONFIGS["gemma2"]
    large = type(config)(
        num_hidden_layers=12, hidden_size=256, layer_types=["sliding_attention"] * 11 + ["full_attention"]
    )
    small = small_like(large)
    assert small.num_hidden_layers == 6
    assert small.layer_types == ["sliding_attention"] * 5 + ["full_attention"]
    assert small.final_logit_softcapping == pytest.approx(1.25 * large.final_logit_softcapping)


def test_small_defaults_set_what_does_nothing_by_default():
    assert small_config("starcoder2").sliding_window == 5
    assert small_config("granite").logits_scaling == 1.25
    assert small_config("nemotron").num_key_value_heads == 2


def test_the_key_of_a_verdict_changes_with_the_options_and_the_code(monkeypatch):
    config = CONFIGS["llama"]
    place = unknown_family._place(config)
    assert unknown_family._place(type(config)(**{**config.to_dict(), "attention_bias": True})) != place
    assert unknown_family._place(type(config)(**{**config.to_dict(), "_name_or_path": "elsewhere"})) == place
    monkeypatch.setattr(unknown_family, "version", lambda name: "2")
    assert unknown_family._place(config) != place
