"""The commands for those who extend ANEE, run in this process."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from anee_core.conformance.scaffold import found_layout
from anee_core.conformance.suite import ADAPTER_CHECKS
from anee_core.conformance.tiny import read_configs, small_config
from anee_core.errors import InputError

CONFIGS = Path(__file__).parents[1] / "configs"

WRONG = """
    from dataclasses import replace
    from anee_adapters import LlamaAdapter

    class Wrong(LlamaAdapter):
        layout = replace(LlamaAdapter.layout, input_norm="post_attention_layernorm")

    NOT_AN_ADAPTER = 3
"""


@pytest.fixture
def wrong(tmp_path, monkeypatch):
    """A module with a wrong adapter in the working directory, not installed."""
    (tmp_path / "wrong_adapter.py").write_text(textwrap.dedent(WRONG))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield "wrong_adapter:Wrong"
    sys.modules.pop("wrong_adapter", None)


def test_sound_adapter_passes_with_a_table_and_a_report(run_anee, tmp_path):
    report = tmp_path / "reports" / "llama.json"
    done = run_anee("conformance", "llama", "--check", "paths", "--check", "keys and values", "--json", report)
    assert done.code == 0
    assert "passed" in done.out
    assert "2 of 2 checks passed" in done.out
    saved = json.loads(report.read_text())
    assert saved["passed"]
    assert set(saved["versions"]) == {"python", "anee", "transformers", "torch"}
    assert [result["check"] for result in saved["results"]] == ["paths", "keys and values"]


def test_wrong_adapter_fails_with_one_line_and_code_1(run_anee, wrong, tmp_path):
    config, report = CONFIGS / "llama.json", tmp_path / "report.json"
    done = run_anee("conformance", wrong, "--config", config, "-k", "paths", "-k", "keys and values", "--json", report)
    assert done.code == 1
    assert "1 of 2 checks passed" in done.out
    line = next(line for line in done.out.splitlines() if line.startswith("llama: keys and values:"))
    assert "expected keys of layer 0, skipped (torch.float32) within" in line
    assert "look at Layout.input_norm" in line
    assert not json.loads(report.read_text())["passed"]


def test_configs_alone_are_checked_with_their_registered_adapters(run_anee):
    done = run_anee("conformance", "--config", CONFIGS, "--check", "paths")
    assert done.code == 0
    names = read_configs(CONFIGS)
    assert f"{len(names)} of {len(names)} checks passed" in done.out
    assert all(name in done.out for name in names)


def test_policies_are_checked(run_anee):
    done = run_anee("conformance", "--policy", "static:skip=1", "--policy", "window:recent=4", "-k", "answers")
    assert done.code == 0
    assert "2 of 2 checks passed" in done.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lama"], "no adapter for 'lama': name one as package.module:Adapter, or a registered family; did you mean"),
        (["no_such_module:Adapter"], "cannot import 'no_such_module' (ModuleNotFoundError"),
        (["wrong_adapter:Wrnog"], "'Wrnog' of wrong_adapter is no ModelAdapter; did you mean 'Wrong'?"),
        (["wrong_adapter:NOT_AN_ADAPTER"], "'NOT_AN_ADAPTER' of wrong_adapter is no ModelAdapter"),
        (["anee_adapters:TableAdapter"], "'TableAdapter' of anee_adapters cannot be made (TableAdapter.__init__()"),
        (["wrong_adapter:Wrong"], "is registered for no model family: pass --config with a small config"),
        (["llama", "--check", "path"], "there is no check 'path'; did you mean 'paths'?"),
        (["llama", "--config", "missing.json"], "there is no config 'missing.json'"),
        (["llama", "--config", "corrupt.json"], "cannot read the config 'corrupt.json'"),
        (["llama", "--config", "untyped.json"], "the config 'untyped.json' says no model_type"),
        (["llama", "--config", "unknown.json"], "'unknown.json' is of the unknown family 'lamma'; did you mean"),
        (["llama", "--config", "wrong.json"], "the config 'wrong.json' is wrong"),
        (["llama", "--config", "empty"], "the folder 'empty' has no .json config"),
        (["--config", "mamba.json"], "no adapter for the model family 'mamba'"),
        (["llama", "--budget", "0.5"], "--budget is for --policy"),
        (["gpt2", "--config", "small.json"], "the config 'small' is of the family 'llama', not 'gpt2'"),
        (
            ["llama", "--config", "small.json", "--model-type", "llama"],
            "--model-type is for an adapter without --config",
        ),
        (["llama", "--config", "small.json"], "has num_hidden_layers=2; the checks need at least 4"),
        (["llama", "--policy", "dense"], "--policy checks policies: leave the adapter and its configs out"),
        (["--policy", "no-such"], "unknown policy 'no-such'"),
    ],
)
def test_wrong_input_is_one_line_that_says_what_to_do(run_anee, wrong, arguments, message):
    Path("corrupt.json").write_text("{")
    Path("untyped.json").write_text("{}")
    Path("unknown.json").write_text('{"model_type": "lamma"}')
    Path("wrong.json").write_text('{"model_type": "llama", "hidden_size": "wide"}')
    Path("mamba.json").write_text('{"model_type": "mamba"}')
    Path("small.json").write_text('{"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 32}')
    Path("empty").mkdir()
    done = run_anee("conformance", *arguments)
    assert done.code == 2
    assert done.errors[-1].startswith("error: ")
    assert message in done.errors[-1]


def test_new_adapter_writes_a_plugin(run_anee, tmp_path):
    done = run_anee("new-adapter", "jais2", "--output", tmp_path)
    assert done.code == 0
    folder = tmp_path / "anee-jais2"
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files == {"pyproject.toml", "README.md", "anee_jais2/__init__.py", "tests/test_conformance.py"}
    assert 'jais2 = "anee_jais2"' in (folder / "pyproject.toml").read_text()
    assert "Jais2Adapter" in (folder / "tests" / "test_conformance.py").read_text()
    again = run_anee("new-adapter", "jais2", "--output", tmp_path)
    assert again.code == 2
    assert "exists already" in again.errors[-1]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("stabelm", "transformers has no model family 'stabelm'; did you mean 'stablelm'?"),
        ("t5", "transformers has no causal LM of the family 't5'"),
        ("mamba", "take no key/value cache"),
        ("bloom", "must be given 'alibi'"),
        ("bert", "lets tokens see the future"),
        ("reformer", "cannot be made small by itself"),
        ("qwen3_next", "take no key/value cache"),
    ],
)
def test_new_adapter_for_what_cannot_be_served_says_why(run_anee, tmp_path, name, message):
    done = run_anee("new-adapter", name, "--output", tmp_path)
    assert done.code == 2
    assert message in done.errors[-1]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("llama", {"rotary": "model.rotary_emb", "final_norm": "model.norm"}),
        ("gpt2", {"learned_positions": "transformer.wpe", "attention": "attn"}),
        ("gptj", {"layers": "transformer.h", "attention": "attn"}),
        ("gpt_neox", {"attention": "attention"}),
        ("mixtral", {"experts": "mlp.experts"}),
        ("gemma2", {"windows": "by type"}),
        ("mistral", {"windows": "all"}),
    ],
)
def test_table_of_names_is_found_in_the_model(kind, expected):
    assert expected.items() <= found_layout(kind).items()


def test_small_config_of_a_family_that_does_not_exist():
    with pytest.raises(InputError, match="did you mean 'llama'"):
        small_config("lama")


def pytest_run(*arguments, folder):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", "/dev/null", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.real
def test_pytest_option_runs_the_suite(tmp_path):
    (tmp_path / "wrong_adapter.py").write_text(textwrap.dedent(WRONG))
    config = str(CONFIGS / "llama.json")
    options = ["--anee-adapter", "wrong_adapter:Wrong", "--anee-config", config]
    done = pytest_run(*options, "-k", "paths or keys", folder=tmp_path)
    assert "1 failed, 1 passed" in done.stdout
    assert "expected keys of layer 0, skipped (torch.float32) within" in done.stdout
    done = pytest_run(*options, "--collect-only", folder=tmp_path)
    assert f"{len(ADAPTER_CHECKS)} tests collected" in done.stdout
    done = pytest_run("--anee-adapter", "lama", folder=tmp_path)
    assert "did you mean 'llama'" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
