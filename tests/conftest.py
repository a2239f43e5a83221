"""Tiny models with random weights, a tiny tokenizer, plugins to install, and a cache folder of the test's own."""

from __future__ import annotations

import gc
import itertools
import os
import runpy
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read by the hub's client when it is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start: two of them would spin

import pytest

# The process that hands out tests to others reads this file too: what takes seconds to import waits for the first use.

ROOT = Path(__file__).parents[1]
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}


def pytest_addoption(parser):
    """Let the campaigns be run in full."""
    parser.addoption("--long", action="store_true", help="run the campaigns in full: an hour")


def pytest_collection_finish():
    """Set up a process that runs tests, before the first."""
    import torch

    torch.set_num_threads(1)  # layers this small only get slower on several
    gc.collect()
    gc.freeze()  # the half million objects of torch and transformers need not be looked through again and again


@pytest.fixture(scope="session")
def make_cache(tmp_path_factory):
    """Return a function that makes a cache folder in which nothing is but what was compiled: that takes seconds."""
    compiled, caches, count = ROOT / "build" / "native", tmp_path_factory.mktemp("anee-caches"), itertools.count()
    compiled.mkdir(parents=True, exist_ok=True)
    compiled.chmod(0o755)  # a library that others could have written is not run

    def make() -> Path:
        folder = caches / str(next(count))
        folder.mkdir()
        (folder / "native").symlink_to(compiled)
        return folder

    return make


@pytest.fixture(autouse=True)
def anee_cache(make_cache, monkeypatch):
    """Keep calibrations out of the user's cache and tests out of each other's way."""
    folder = make_cache()
    monkeypatch.setenv("ANEE_CACHE", str(folder))
    return folder


@pytest.fixture
def note_stacks(monkeypatch):
    """Return what starts a list that grows with each block given to the native step for all layers at once: the number
    of its tokens, or None if it was refused; only of those that a function of the `Stack` picks.
    """
    from anee_core.steps.native.step import NativeStep

    def start(noted=lambda stack: True):
        found, whole = [], NativeStep.all_layers

        def noting(self, hidden_states, stack, cache):
            output = whole(self, hidden_states, stack, cache)
            if noted(stack):
                found.append(None if output is None else hidden_states.shape[1])
            return output

        monkeypatch.setattr(NativeStep, "all_layers", noting)
        return found

    return start


@pytest.fixture
def no_environment_report(monkeypatch):
    """Let lm-eval leave out of its results what machine it runs on: asking every tool takes longer than scoring."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


@pytest.fixture(scope="session")
def tiny_llama():
    """A Llama with four layers and grouped queries. Shared: tests leave it as it is."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        **SPECIAL,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def tiny_gpt2():
    """A GPT-2 with four layers and 64 learned positions. Shared: tests leave it as it is."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=97, n_embd=32, n_layer=4, n_head=4, n_positions=64, **SPECIAL)
    return GPT2LMHeadModel(config).eval()


@pytest.fixture(scope="session")
def word_tokenizer():
    """A tokenizer of 97 entries: one per printable ASCII character, so that every text survives a round trip."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = [chr(code) for code in range(32, 127)]
    vocab = {token: i for i, token in enumerate(["<pad>", "<eos>", *letters])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<pad>")


@pytest.fixture(scope="session")
def llama_folder(tiny_llama, word_tokenizer, tmp_path_factory):
    """The tiny Llama and its tokenizer on disk. Shared: tests that change it change a copy."""
    folder = tmp_path_factory.mktemp("llama")
    tiny_llama.save_pretrained(folder)
    word_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path):
    """A file of made-up sentences."""
    import torch

    generator = torch.Generator().manual_seed(0)
    words = ["the cat", "a dog", "saw", "and then", "ran to", "the house", "of the man", "by night"]
    lines = [" ".join(words[i] for i in torch.randint(0, 8, (12,), generator=generator)) for _ in range(300)]
    path = tmp_path / "text.txt"
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def install(tmp_path_factory, monkeypatch):
    """Return a function that installs a distribution for the length of a test: its module and what pip would write.

    ``install("my-plugin", "source of my_plugin.py")`` makes one whose entry point ``my-plugin`` names that module.
    """
    modules = []

    def install_distribution(name: str, source: str, entry_points: str | None = None, version: str = "1.0") -> None:
        module = name.replace("-", "_")
        modules.append(module)
        folder = tmp_path_factory.mktemp(module)
        (folder / f"{module}.py").write_text(textwrap.dedent(source))
        info = folder / f"{module}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[anee]\n{entry_points or f'{name} = {module}'}\n")
        monkeypatch.syspath_prepend(folder)

    yield install_distribution
    for module in modules:
        sys.modules.pop(module, None)


@dataclass(frozen=True)
class Outcome:
    """How a command ended. ``errors`` holds the lines of stderr that are no progress bar."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        lines = [line.split("\r")[-1] for line in self.err.splitlines()]
        return [line for line in lines if line.strip() and "it/s]" not in line]


@pytest.fixture
def run_anee(monkeypatch, capsys):
    """Return a function that runs the ``anee`` command in this process."""
    from anee.cli import main

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["anee", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        code = stop.value.code
        return Outcome(code if isinstance(code, int) else 0 if code is None else 1, *capsys.readouterr())

    return run


@pytest.fixture
def run_script(monkeypatch, capsys):
    """Return a function that runs a script of the repository in this process; the answer is what it printed."""

    def run(script: str, *arguments: object) -> str:
        path = ROOT / script
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
        monkeypatch.syspath_prepend(path.parent)
        monkeypatch.setenv("COLUMNS", "200")
        capsys.readouterr()
        runpy.run_path(str(path), run_name="__main__")
        return capsys.readouterr().out

    return run
