"""Other engines in ``anee bench``: the GGUF files they read, and what happens where one is missing."""

import importlib.util
import logging
import multiprocessing
import os
import sys
from functools import partial
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from unittest.mock import Mock

import pytest
import torch
from tiny import PLUGINS, build, tokens
from transformers import AutoModelForCausalLM

from anee_core.bench.options import BenchOptions
from anee_core.bench.peers.engines import peers
from anee_core.bench.peers.gguf_file import write_gguf
from anee_core.bench.peers.openvino_model import write_openvino
from anee_core.bench.peers.own_process import OwnProcess
from anee_core.bench.speed import measure
from anee_core.bench.timing import Stopwatch
from anee_core.conformance.subject import without_layers
from anee_core.errors import MissingPackageError, ModelError

PACKAGES = ("llama_cpp", "xllamacpp", "ctranslate2", "openvino")
here = partial(peers, start_engine=lambda start: start())
"""Engines in this process."""


def shallow(family):
    """Return a model of two layers: others convert one after the other."""
    path = PLUGINS.adapters[family].layout.layers
    return without_layers(build(family), path, set(range(2, 6)))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gguf_files_hold_the_model(family, dtype, tmp_path):
    network = build(family).to(dtype)
    write_gguf(network, tmp_path / "model.gguf")
    known = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", config=network.config, dtype=torch.float32
    )
    ids = tokens(1, 9)
    with torch.no_grad():
        torch.testing.assert_close(known(ids).logits, network.float()(ids).logits, atol=1e-5, rtol=1e-4)


def test_what_gguf_cannot_hold_is_an_error(tmp_path, monkeypatch):
    with pytest.raises(ModelError, match="cannot write a gptj"):
        write_gguf(build("gptj"), tmp_path / "model.gguf")
    with pytest.raises(ModelError, match="float16"):
        write_gguf(build("llama").half(), tmp_path / "model.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingPackageError, match="peers"):
        write_gguf(build("llama"), tmp_path / "model.gguf")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "rotary"),
        ({"head_dim": 3}, "heads"),
        ({"attention_bias": True}, "biases"),
    ],
)
def test_what_other_engines_would_read_wrongly_is_an_error(changes, named, tmp_path):
    network = build("llama")
    for name, value in changes.items():
        setattr(network.config, name, value)
    with pytest.raises(ModelError, match=named):
        write_gguf(network, tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()


def test_engines_that_are_not_installed_take_no_part(tmp_path, monkeypatch, caplog):
    for package in PACKAGES:
        monkeypatch.setitem(sys.modules, package, None)
    assert peers(build("llama"), None, tmp_path, 16) == {}
    assert caplog.text.count("takes no part") == 3


def pretend(monkeypatch, package, **contents):
    """Install a package that has these contents alone, and no other engine."""
    for other in PACKAGES:
        monkeypatch.setitem(sys.modules, other, None)
    fake = ModuleType(package)
    fake.__spec__ = ModuleSpec(package, None)
    vars(fake).update(contents)
    monkeypatch.setitem(sys.modules, package, fake)


class CountingLlama:
    """Stands in for llama-cpp-python: "generates" the numbers after the prompt's last token."""

    def __init__(self, path, **options):
        assert Path(path).read_bytes()[:4] == b"GGUF"

    def reset(self):
        """Forget everything."""

    def generate(self, prompt, **options):
        """Yield token ids without end."""
        while True:
            prompt = [prompt[-1] + 1]
            yield prompt[-1]


def test_llama_cpp_takes_part(llama_folder, tmp_path, monkeypatch):
    pretend(monkeypatch, "llama_cpp", Llama=CountingLlama)
    monkeypatch.setattr("anee_core.bench.speed.peers", here)
    run = here(build("llama"), None, tmp_path, 16)["llama.cpp"]
    watch = Stopwatch()
    run(torch.tensor([[4, 5]]), 3, watch)
    assert len(watch.marks) == 4  # the prompt and three tokens
    options = BenchOptions(str(llama_folder), "float32", 1, 5, 3, 1, skipped=(), peers=True)
    found = {record["contender"]: record for record in measure(options)["records"]}
    assert found["llama.cpp"]["ms_per_token"] > 0
    assert found["llama.cpp"]["layers_run"] == 1
    assert found["llama.cpp"]["parts"] == {}


class CountingServer:
    """Stands in for xllamacpp's: "generates" the names of the numbers after the prompt's last token."""

    def __init__(self, params):
        assert Path(params.model.path).read_bytes()[:4] == b"GGUF"

    def handle_completions(self, request, see):
        """Tell of each token, and of the end."""
        for i in range(request["max_tokens"]):
            see({"choices": [{"text": f"<{request['prompt'][-1] + i + 1}>"}]})
        see({"choices": [{"text": ""}]})


class Tokens(list):
    """A streamer that keeps what it gets."""

    put = list.append


def test_llama_cpp_as_it_comes_compiled_takes_part(tmp_path, monkeypatch):
    pretend(monkeypatch, "xllamacpp", Server=CountingServer, CommonParams=Mock)
    seen = Tokens()
    here(build("llama"), None, tmp_path, 16)["llama.cpp"](torch.tensor([[4, 5]]), 3, seen)
    assert [tokens.flatten().tolist() for tokens in seen] == [[4, 5], [6], [7], [8]]


@pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="xllamacpp is not installed")
def test_llama_cpp_writes_what_transformers_writes(tmp_path, monkeypatch):
    for package in ("llama_cpp", "ctranslate2", "openvino"):
        monkeypatch.setitem(sys.modules, package, None)
    network = build("llama").to(torch.bfloat16)
    prompt, seen = torch.tensor([[4, 5, 17, 80]]), Tokens()
    peers(network, None, tmp_path, 16)["llama.cpp"](prompt, 6, seen)
    known = network.generate(prompt, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.cat([tokens.flatten() for tokens in seen]).tolist() == known[0].tolist()


def test_an_engine_that_brings_its_process_down_is_an_error(monkeypatch):
    forking = multiprocessing.get_context("fork")  # has torch already; how a process starts is not the question here
    monkeypatch.setattr(multiprocessing, "get_context", lambda kind: forking)
    with pytest.raises(ModelError, match="ended"):
        OwnProcess(partial(os._exit, 1))
    run = OwnProcess(partial(partial, os._exit))  # which takes no prompt
    with pytest.raises(ModelError, match="ended"):
        run(torch.tensor([[4, 5]]), 3, Tokens())


@pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="openvino is not installed")
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_openvino_writes_what_transformers_writes(family, tmp_path, monkeypatch):
    for package in ("llama_cpp", "xllamacpp", "ctranslate2"):
        monkeypatch.setitem(sys.modules, package, None)
    network = shallow(family)
    run = here(network, None, tmp_path, 16)["OpenVINO"]
    for prompt in (torch.tensor([[4, 5, 17, 80]]), torch.tensor([[9, 30]])):
        seen = Tokens()
        run(prompt, 6, seen)
        known = network.generate(prompt, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
        assert torch.cat([tokens.flatten() for tokens in seen]).tolist() == known[0].tolist()


@pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="openvino is not installed")
@pytest.mark.parametrize(
    ("family", "dtype", "named"),
    [("mistral", torch.float32, "windows"), ("llama", torch.float16, "does not compute in float16")],
)
def test_what_openvino_would_not_compute_alike_is_an_error(family, dtype, named, tmp_path):
    with pytest.raises(ModelError, match=named):
        write_openvino(build(family).to(dtype), tmp_path / "model.xml")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="openvino is not installed")
def test_a_model_that_openvino_cannot_convert_is_an_error(tmp_path):
    network, root = shallow("llama"), logging.getLogger()
    before = root.level, root.filters[:], root.handlers[:]
    network.model.norm.forward = torch.special.bessel_j0
    with pytest.raises(ModelError, match="cannot convert a LlamaForCausalLM"):
        write_openvino(network, tmp_path / "model.xml")
    assert (root.level, root.filters, root.handlers) == before
