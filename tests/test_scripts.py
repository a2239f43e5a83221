"""The examples and benchmarks run, on tiny models."""

import json
from pathlib import Path

import pytest
from tiny import build

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory, word_tokenizer):
    folder = tmp_path_factory.mktemp("model")
    build("llama").save_pretrained(folder)
    word_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the cat saw a dog and then ran to the house of the man by night. " * 40)
    return path


@pytest.mark.parametrize("arguments", [["demo.py", "--policy", "heuristic:protect=1 1"], ["own_policy.py"]])
def test_examples_run(arguments, tiny_folder, run_script):
    name, *options = arguments
    shown = run_script(f"examples/{name}", "--model", tiny_folder, *options)
    assert "layers run per token" in shown
    assert "█" in shown


def test_every_example_is_run():
    shown = {"demo.py", "own_policy.py"}
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == shown


def test_decoding(tiny_folder, tmp_path, run_script):
    out = tmp_path / "decode.json"
    options = ["--dtypes", "float32", "--tokens", "3", "--repeats", "1", "--json", out]
    run_script("benchmarks/decode.py", "--model", tiny_folder, *options)
    assert out.is_file()


def test_token_dropping_goes_on_where_it_was(tiny_folder, text, tmp_path, run_script):
    arguments = [tiny_folder, "--text", f"nights={text}", "--out", tmp_path / "out"]
    sizes = ["--length", "24", "--from", "8", "--blocks", "2", "--batch", "2"]
    run_script("benchmarks/token_dropping.py", *arguments, *sizes, "--only", "window")
    first = json.loads((tmp_path / "out.json").read_text())["records"]
    first["nights window:sinks=0,keep=0.9"]["perplexity"] = 7.0  # what was measured is not measured again
    (tmp_path / "out.json").write_text(
        json.dumps({**json.loads((tmp_path / "out.json").read_text()), "records": first})
    )
    run_script("benchmarks/token_dropping.py", *arguments, *sizes, "--only", "window", "TOVA")
    records = json.loads((tmp_path / "out.json").read_text())["records"]
    assert records["nights window:sinks=0,keep=0.9"]["perplexity"] == 7.0
    shares = {round(r["dropped"], 1) for r in records.values() if r["name"] == "TOVA"}
    assert len(shares) >= 5
    assert (tmp_path / "out.png").exists()
    assert "| TOVA |" in (tmp_path / "out.md").read_text()


def test_kv_cache(tiny_folder, tmp_path, run_script):
    sizes = ["--context", "64", "--steps", "2", "--repeats", "1", "--json", tmp_path / "out.json"]
    run_script("benchmarks/kv_cache.py", "--shape", tiny_folder, "--batch", "1", "2", *sizes)
    records = json.loads((tmp_path / "out.json").read_text())["records"]
    assert len(records) == 4
    assert all(r["kv_mib"] > 0 for r in records)


def test_picture_of_kept_tokens_shows_what_a_policy_keeps(tiny_folder, text, tmp_path, run_script):
    sizes = ["--length", "32", "--blocks", "2", "--back", "12", "--show", "20", "--out", tmp_path / "out"]
    arguments = [tiny_folder, "--policy", "window:sinks=4,recent=8", "--text", text]
    run_script("benchmarks/kept_tokens.py", *arguments, *sizes)
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["kept"].pop("first four") == 1
    assert sum(found["tokens"].values()) == 2 * 20
    assert found["kept"]
    assert set(found["kept"].values()) == {0}
    assert (tmp_path / "out.png").exists()


def test_cache_over_time_shows_what_was_freed(tiny_folder, text, tmp_path, run_script):
    sizes = ["--length", "96", "--tokens", "3", "--chunk", "16", "--out", tmp_path / "out"]
    policies = ["--policy", "dense", "--policy", "window:sinks=1,recent=4"]
    run_script("benchmarks/cache_over_time.py", tiny_folder, "--text", text, *sizes, *policies)
    dense, window = json.loads((tmp_path / "out.json").read_text())["policies"].values()
    assert dense["slots"] == [98] * 6
    assert window["slots"] == [5] * 6
    assert window["peak_mib"] < dense["peak_mib"] / 3
    assert (tmp_path / "out.png").exists()
