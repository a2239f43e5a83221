"""GGUF files are read as transformers reads them: by their path, by their folder, by name."""

import string

import pytest
import torch
from tiny import build, tokens

import anee
from anee_core.bench.peers import gguf_file
from anee_core.errors import ModelError

IDS = tokens()
POLICY = "static:skip=1"


def add_letters(writer, gguf, count):
    """Add a vocabulary of bytes and one merge."""
    names = [*string.ascii_letters, "\u0120", "th", *(f"<{i}>" for i in range(count))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(names[:count])
    writer.add_token_types([int(gguf.TokenType.NORMAL)] * count)
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(count - 1)
    writer.add_eos_token_id(count - 1)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with one GGUF file, of a tiny Llama."""
    monkeypatch.setattr(gguf_file, "_add_names_of_tokens", add_letters)
    gguf_file.write_gguf(build("llama"), tmp_path / "tiny.gguf")
    return tmp_path


@torch.no_grad()
def test_a_file_or_its_folder_is_a_model(folder):
    expected = anee.load(build("llama"), POLICY)(IDS).logits
    file = folder / "tiny.gguf"
    for model in (anee.load(file, POLICY), anee.load(folder, POLICY), anee.load(folder, POLICY, gguf_file=file.name)):
        assert torch.equal(model(IDS).logits, expected)
        assert model.tokenizer.convert_ids_to_tokens(model.tokenizer("the")["input_ids"])[-2:] == ["th", "e"]
        assert len(model.generate("the", max_new_tokens=3).new_tokens[0]) == 3
    assert anee.load(file).name == "tiny.gguf"
    assert anee.load(file, dtype="bfloat16").dtype == torch.bfloat16


@torch.no_grad()
def test_weights_in_other_formats_come_first(folder):
    other = build("llama")
    other.lm_head.weight.mul_(2)
    other.save_pretrained(folder)
    assert torch.equal(anee.load(folder)(IDS).logits, anee.load(other)(IDS).logits)
    assert not torch.equal(anee.load(folder, gguf_file="tiny.gguf")(IDS).logits, anee.load(other)(IDS).logits)


def test_one_of_several_files_has_to_be_named(folder, run_anee):
    (folder / "more.gguf").write_bytes((folder / "tiny.gguf").read_bytes())
    with pytest.raises(ModelError, match=r"holds 2 GGUF files: name one, as in gguf_file='more.gguf'"):
        anee.load(folder)
    assert anee.load(folder, gguf_file="tiny.gguf").name == folder.name
    assert run_anee("generate", folder / "tiny.gguf", "the", "--max-new-tokens", 2).code == 0


@pytest.mark.parametrize("name", ["damaged.gguf", "absent.gguf"])
def test_what_is_no_gguf_file_is_one_line(folder, name):
    (folder / "damaged.gguf").write_text("no model")
    with pytest.raises(ModelError, match=f"'{folder}' cannot be read: .*{name}") as refused:
        anee.load(folder, gguf_file=name)
    assert "\n" not in str(refused.value)
