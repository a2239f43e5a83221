"""From where models come: folders, a cache of the hub, memory; and the dtype that they run in."""

import copy
import json
import shutil

import pytest
import torch
from tiny import skipping_equals_removing
from transformers import AutoModelForCausalLM

import anee
from anee_core.errors import AneeError, InputError, ModelError

IDS = torch.randint(2, 97, (2, 11), generator=torch.Generator().manual_seed(0))


def test_local_folder_gives_the_model_and_its_tokenizer(llama_folder, tiny_llama, word_tokenizer):
    for folder in (llama_folder, str(llama_folder)):
        model = anee.load(folder, fast=False)
        assert torch.equal(model(IDS).logits, tiny_llama(IDS).logits)
        assert model.tokenizer.get_vocab() == word_tokenizer.get_vocab()
        assert not model.training
        assert not model.model.training


def test_local_folder_with_a_policy_skips(llama_folder, tiny_llama):
    skipping_equals_removing(anee.load(llama_folder, "static:skip=1 2"), tiny_llama, IDS)


def test_loaded_model_is_used_and_not_copied(tiny_llama, tiny_gpt2):
    for network in (tiny_llama, tiny_gpt2):
        model = anee.load(network, fast=False)
        assert model.model is network
        assert model.tokenizer is None
        assert torch.equal(model(IDS).logits, network(IDS).logits)
        skipping_equals_removing(anee.load(network, "static:skip=1 2"), network, IDS)


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


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", ["tiny_llama", "tiny_gpt2"])
def test_half_precision_equals_transformers_own(request, family, name):
    network = copy.deepcopy(request.getfixturevalue(family)).to(getattr(torch, name))
    model = anee.load(network, fast=False)
    assert model.dtype == network.dtype
    assert torch.equal(model(IDS).logits, network(IDS).logits)
    skipping_equals_removing(anee.load(network, "static:skip=1 2", fast=False), network, IDS)


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


def test_code_that_lies_in_a_model_folder_runs_only_if_asked_for(llama_folder, tmp_path, monkeypatch, run_anee):
    folder, ran = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(llama_folder, folder)
    (folder / "own.py").write_text(
        f"open({str(ran)!r}, 'w').close()\nfrom transformers import LlamaConfig\nclass OwnConfig(LlamaConfig): pass\n"
    )
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # to whom transformers would put the question
    with pytest.raises(AneeError):
        anee.load(folder)
    assert run_anee("generate", folder, "Hello").code == 2
    assert not ran.exists()
    run_anee("generate", folder, "Hello", "--trust-remote-code")
    assert ran.exists()
