"""The examples and benchmarks run, on tiny models."""

import json
from pathlib import Path

import pytest
import torch
from tiny import build

import anee
from anee_core.calibration import GateCalibration, calibrate_gate
from anee_core.calibration.options import FitOptions
from anee_core.evaluation import text_quality

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("arguments", [["demo.py", "--policy", "heuristic:protect=1 1"], ["own_policy.py"]])
def test_examples_run(arguments, llama_folder, run_script):
    name, *options = arguments
    shown = run_script(f"examples/{name}", "--model", llama_folder, *options)
    assert "layers run per token" in shown
    assert "█" in shown


def test_layers_and_tokens_together(llama_folder, run_script):
    policies = ["--layers", "static:skip=1", "--tokens", "tova:keep=0.5"]
    shown = run_script("examples/combine.py", "--model", llama_folder, *policies)
    last = next(line for line in shown.splitlines() if "static:skip=1+tova" in line)
    assert "75%" in last
    assert "0%" not in last.split()


def test_an_adapter_is_written_and_checked(run_script):
    shown = run_script("examples/own_adapter.py")
    assert shown.count("passed") == 26
    assert "FAILED" not in shown
    assert "66.7%" in shown  # four of six layers


def test_both_are_trained_and_used_together(llama_folder, text, tmp_path, run_script):
    small = ["--steps", "2", "--length", "48", "--rank", "4", "--budget", "0.95"]
    shown = run_script("examples/train_both.py", "--model", llama_folder, "--text", text, "--folder", tmp_path, *small)
    assert shown.count("perplexity") == 4
    assert "+shortcuts" in shown


def test_walk(llama_folder, tmp_path, run_script):
    arguments = ["--policy", "random:p=0.5,protect=1 1", "--out", tmp_path / "walk.html"]
    shown = run_script("examples/walk.py", "--model", llama_folder, *arguments)
    assert "relative change by layer" in shown
    assert (tmp_path / "walk.html").exists()


@pytest.mark.usefixtures("no_environment_report")
def test_scores_inside_lm_eval(llama_folder, run_script):
    shown = run_script("examples/lm_eval_run.py", "--model", llama_folder, "--policy", "static:skip=1")
    dense, static = (line for line in shown.splitlines() if "last_word" in line)
    assert "spent 100.0%" in dense
    assert "spent 77.3%" in static


def test_every_example_is_run():
    here = Path(__file__).read_text()
    examples = {path.name for path in (ROOT / "examples").glob("*.py")}
    assert {name for name in examples if name in here} == examples


def test_token_dropping_goes_on_where_it_was(llama_folder, text, tmp_path, run_script):
    arguments = [llama_folder, "--text", f"nights={text}", "--out", tmp_path / "out"]
    sizes = ["--length", "96", "--from", "64", "--blocks", "2", "--batch", "2"]
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


def test_layer_skipping_holds_policies_against_the_literature(word_tokenizer, text, tmp_path, run_script):
    folder, model_folder = tmp_path / "gate", tmp_path / "model"
    build("llama").save_pretrained(model_folder)
    word_tokenizer.save_pretrained(model_folder)
    model = anee.load(model_folder)
    calibrate_gate(model, folder, GateCalibration(text, 4, 32, fit=FitOptions(rank=2), progress=False))
    arguments = [model_folder, "--calibration", text, "--text", f"nights={text}", "--out", tmp_path / "out"]
    sizes = ["--length", "100", "--blocks", "2", "--calibration-blocks", "2", "--budgets", "0.8", "0.9"]
    trained = ["--gate", folder, "--shortcuts", folder]
    run_script("benchmarks/layer_skipping.py", *arguments, *sizes, *trained)
    found = json.loads((tmp_path / "out.json").read_text())["records"].values()
    by_name = {(r["name"], r["budget"]): r for r in found}
    assert by_name["dense", 1.0]["divergence"] == 0
    for name in ("rl", "gate only", "random", "random + shortcuts", "early exit"):
        assert by_name[name, 0.8]["spent"] < by_name[name, 0.9]["spent"] < 1, name
        assert by_name[name, 0.8]["divergence"] > 0
    assert by_name["best set", 0.8]["skipped"] == by_name["block influence", 0.8]["skipped"] == pytest.approx(1 / 3)
    assert "| block influence | 0.80 |" in (tmp_path / "out.md").read_text()
    assert (tmp_path / "out.png").exists()


@pytest.mark.usefixtures("no_environment_report")
def test_task_scores_lie_beside_the_dense_model(llama_folder, text, tmp_path, run_script):
    tasks, line = tmp_path / "tasks", {"context": "the night is long and the", "continuation": "night"}
    tasks.mkdir()
    (tasks / "last_word.jsonl").write_text("".join(json.dumps(line) + "\n" for _ in range(4)))
    line = {"query": "the night is", "choices": ["long", "the"], "gold": 0}
    (tasks / "choice.jsonl").write_text("".join(json.dumps(line) + "\n" for _ in range(4)))
    arguments = [llama_folder, "--run", "static:skip=1 2", "--tasks", "last_word,choice", "--tasks-dir", tasks]
    shown = run_script("benchmarks/task_scores.py", *arguments, "--out", tmp_path / "out")
    found = json.loads((tmp_path / "out.json").read_text())["records"]
    assert [record["examples"] for record in found.values()] == [4] * 4
    assert found["dense choice"]["spent"] == 1
    assert found["static:skip=1 2 choice"]["spent"] < 0.8
    assert "| policy | spent | last_word (4) | choice (4) |" in shown
    assert "| static:skip=1 2 |" in (tmp_path / "out.md").read_text()
    names = ("block influence", "early exit")
    others = [word for name in names for word in ("--contender", name)]
    sizes = ["--calibration", text, "--length", "100", "--budgets", "0.8", "0.9"]
    run_script("benchmarks/task_scores.py", *arguments, *others, *sizes, "--out", tmp_path / "out")
    more = json.loads((tmp_path / "out.json").read_text())["records"]
    assert {key: record for key, record in more.items() if key in found} == found  # nothing was done again
    for name in names:
        assert 0.5 < more[f"{name}@0.8 choice"]["spent"] <= more[f"{name}@0.9 choice"]["spent"] < 1, name
    assert (tmp_path / "out.png").exists()


def test_block_influence_and_confidence_are_those_of_the_model(tiny_llama, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from baselines import block_influence, early_exits, without_least_influential

    blocks = torch.randint(3, 97, (4, 48), generator=torch.Generator().manual_seed(0))
    model = anee.load(tiny_llama)
    states = []
    hooks = [
        layer.register_forward_hook(lambda _, got, out: states.append((got[0], out)))
        for layer in tiny_llama.model.layers
    ]
    with torch.no_grad():
        tiny_llama(blocks)
    for hook in hooks:
        hook.remove()
    wanted = [1 - float(torch.cosine_similarity(before, after, dim=-1).mean()) for before, after in states]
    influence = block_influence(model, blocks)
    assert influence == pytest.approx(wanted, abs=1e-5)
    assert without_least_influential(model, influence, 1.0) == "static:skip="
    least = influence.index(min(influence))
    assert without_least_influential(model, influence, 0.8) == f"static:skip={least}"
    for budget, policy in early_exits(model, blocks, [0.6, 0.8]).items():
        exiting = anee.load(tiny_llama, policy)
        assert text_quality(exiting, blocks).spent == pytest.approx(budget, abs=0.1)


def test_kv_cache(llama_folder, tmp_path, run_script):
    sizes = ["--context", "64", "--steps", "2", "--repeats", "1", "--json", tmp_path / "out.json"]
    run_script("benchmarks/kv_cache.py", "--shape", llama_folder, "--batch", "1", "2", *sizes)
    records = json.loads((tmp_path / "out.json").read_text())["records"]
    assert len(records) == 6
    assert all(r["kv_mib"] > 0 for r in records)
    bounds = [r["at_most"] for r in records if r["at_most"] is not None]
    assert [r["contender"] for r in records] == ["dense", "80% dropped", "no context"] * 2
    assert len(bounds) == 2


def test_picture_of_kept_tokens_shows_what_a_policy_keeps(llama_folder, text, tmp_path, run_script):
    sizes = ["--length", "32", "--blocks", "2", "--back", "12", "--show", "20", "--out", tmp_path / "out"]
    arguments = [llama_folder, "--policy", "window:sinks=4,recent=8", "--text", text]
    run_script("benchmarks/kept_tokens.py", *arguments, *sizes)
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["kept"].pop("first four") == 1
    assert sum(found["tokens"].values()) == 2 * 20
    assert found["kept"]
    assert set(found["kept"].values()) == {0}
    assert (tmp_path / "out.png").exists()


def test_picture_of_depth_shows_what_a_policy_runs(llama_folder, text, tmp_path, run_script):
    sizes = ["--length", "32", "--blocks", "2", "--show", "20", "--out", tmp_path / "out"]
    run_script("benchmarks/token_depth.py", llama_folder, "--policy", "static:skip=1", "--text", text, *sizes)
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["by_layer"] == [1, 0, 1, 1]
    assert set(found["ran"].values()) == {0.75}
    assert sum(found["tokens"].values()) == 2 * 32
    assert (tmp_path / "out.png").exists()


def test_texts_side_by_side(llama_folder, tmp_path, run_script):
    runs = ["--run", "dense", "--run", "random:protect=1 1@0.8", "--prompt", "the cat", "--tokens", "3"]
    run_script("benchmarks/side_by_side.py", llama_folder, *runs, "--out", tmp_path / "out")
    table = (tmp_path / "out.md").read_text()
    assert "**the cat**" in table
    assert "| dense | 1.00 |" in table
    assert "| random:protect=1 1@0.8 | " in table


def test_prompts_are_timed_by_length(llama_folder, tmp_path, run_script):
    sizes = ["--tokens", "5", "--repeats", "1", "--out", tmp_path / "out"]
    run_script("benchmarks/prompts.py", llama_folder, "--run", "dense", *sizes)
    shown = run_script("benchmarks/prompts.py", llama_folder, "--run", "dense", "--run", "static:skip=1", *sizes)
    assert [line.split(" | ")[:2] for line in shown.splitlines() if line.startswith("| 5")] == [
        ["| 5", "dense"],
        ["| 5", "static:skip=1"],
    ]
    found = json.loads((tmp_path / "out.json").read_text())["records"]
    assert all(record["fast_ms"] > 0 < record["modules_ms"] for record in found.values())


def test_cache_over_time_shows_what_was_freed(llama_folder, text, tmp_path, run_script):
    sizes = ["--length", "96", "--tokens", "3", "--chunk", "16", "--out", tmp_path / "out"]
    policies = ["--policy", "dense", "--policy", "window:sinks=1,recent=4"]
    run_script("benchmarks/cache_over_time.py", llama_folder, "--text", text, *sizes, *policies)
    dense, window = json.loads((tmp_path / "out.json").read_text())["policies"].values()
    assert dense["slots"] == [98] * 4
    assert window["slots"] == [5] * 4
    assert window["most_mib"] < dense["most_mib"] / 3
    assert (tmp_path / "out.png").exists()


def test_the_simplest_books_have_the_commonest_words(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from train_mini import END, simplest_books

    plain = "the cat saw the dog and the dog saw the cat. " * 200
    rare = " ".join("".join("abcdefghij"[int(d)] for d in f"{i:05}") for i in range(4000))
    (tmp_path / "books.txt").write_text(f"{rare}\n{END}\n{plain}")
    path = simplest_books([str(tmp_path / "books.txt")], 0.2, tmp_path)
    assert Path(path).read_text() == plain.strip()
    (tmp_path / "books.txt").unlink()
    assert simplest_books([str(tmp_path / "books.txt")], 0.2, tmp_path) == path


def test_a_deep_mini_model_begins_with_the_layers_of_a_shallow_one(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from train_mini import begin_with, make_model

    shallow, deep = make_model(64, layers=2), make_model(64, layers=5)
    shallow.save_pretrained(tmp_path)
    begin_with(deep, tmp_path)
    for i, layer in enumerate(deep.transformer.h):
        for name, weight in shallow.transformer.h[i % 2].state_dict().items():
            assert torch.equal(layer.state_dict()[name], weight)
    assert torch.equal(deep.lm_head.weight, shallow.transformer.wte.weight)
    assert torch.equal(deep.transformer.ln_f.weight, shallow.transformer.ln_f.weight)


def test_the_mini_model_is_trained_from_text(text, tmp_path, run_script):
    options = ["--steps", "1", "--batch", "1", "--vocabulary", "300", "--decay", "1", "--layers", "2"]
    run_script("benchmarks/train_mini.py", "--text", text, "--valid", text, "--folder", tmp_path / "run", *options)
    model = anee.load(tmp_path / "run" / "weights")
    assert model.dtype == torch.bfloat16
    assert model.config.anee_backbone.startswith("anee-mini")
    assert model.generate("the cat saw", max_new_tokens=3).text.startswith("the cat saw")
