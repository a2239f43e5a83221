"""``anee bench``: what it writes, and that it goes on where it was."""

import json

import pytest
import torch
from tiny import adaptive, build, gate_weights, tokens
from transformers import GPT2Config

from anee_core.bench import random_models as shapes
from anee_core.bench import speed as bench
from anee_core.bench.options import BenchOptions, policy_and_budget
from anee_core.bench.timing import Stopwatch, TimedStep
from anee_core.errors import InputError


def test_bench_from_the_command_line(llama_folder, tmp_path, run_anee):
    out, plot = tmp_path / "bench.json", tmp_path / "bench.png"
    options = ["--dtype", "float32", "--context", "9", "--tokens", "3", "--repeats", "2", "--skipped", "0.5"]
    arguments = [
        "bench",
        llama_folder,
        *options,
        "--policy",
        "static:skip=1",
        "--weights",
        "int8",
        "--json",
        out,
        "--plot",
        plot,
        "--markdown",
        tmp_path / "bench.md",
    ]
    result = run_anee(*arguments, "--batch", "2")
    assert result.code == 0, result.err
    found = json.loads(out.read_text())["records"]
    (record,) = found.values()
    rows = {row["contender"]: row for row in record["records"]}
    assert next(iter(rows)) == "transformers generate"
    assert rows["transformers generate"]["speedup"] == 1
    assert rows["ANEE static:skip=1"]["layers_run"] == pytest.approx(0.75)
    assert rows["ANEE 50% skipped"]["layers_run"] < 1
    assert rows["ANEE 50% skipped, int8"]["layers_run"] < 1 == rows["ANEE dense, int8"]["layers_run"]
    same = {rows[name]["layers_run"] for name in rows if "50% skipped" in name and "int" not in name}
    assert len(same) == 1  # the same decisions, at once and deferred
    assert rows["ANEE dense, decode()"]["ideal_ms"] == rows["ANEE dense, decode()"]["ms_per_token"]
    assert plot.stat().st_size > 1000
    written = (tmp_path / "bench.md").read_text()
    assert "| ANEE static:skip=1 |" in written
    assert written.startswith(f"## {record['title']}")
    ours = [row for row in record["records"] if row["parts"]]
    assert len(ours) == 8
    assert all(row["parts"][name] > 0 for row in ours for name in ("layers", "policy", "head", "rest"))
    for row in ours:
        attention = row["parts"]["attention"]
        if row["contender"] == "ANEE dense, own modules":
            assert attention is None
        else:
            assert 0 < attention < row["parts"]["layers"]
    # A second size is added; the first is not measured again.
    assert run_anee(*arguments, "--batch", "2", "--batch", "1").code == 0
    both = json.loads(out.read_text())["records"]
    assert len(both) == 2
    assert next(iter(both.values())) == record
    assert run_anee(*arguments, "--repeats", "3").code == 2


def test_stopwatch_tells_prompt_from_tokens():
    watch = Stopwatch()
    watch.marks = [0.0, 2.0, 3.0, 3.5, 4.0]
    assert watch.prompt_seconds == 2
    assert watch.token_seconds == 0.5


def test_transformers_is_compiled_where_it_is_asked_for(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiled.append(options) or function)
    monkeypatch.setitem(shapes.SIZES, "tiny", lambda: GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=50))
    options = {"context": 4, "tokens": 3, "repeats": 1, "skipped": ()}
    found = bench.measure(BenchOptions("tiny", "float32", compiled=True, **options))
    assert [r["contender"] for r in found["records"]][:2] == ["transformers generate", "transformers compiled"]
    assert compiled


def test_shapes_have_seeded_random_weights(monkeypatch):
    monkeypatch.setitem(shapes.SIZES, "tiny", lambda: GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=50))
    one, two = shapes.build("tiny"), shapes.build("tiny", torch.bfloat16)
    assert two.dtype == torch.bfloat16
    assert torch.equal(one.transformer.wte.weight.bfloat16(), two.transformer.wte.weight)
    assert {shapes.SIZES[name]().model_type for name in shapes.SIZES} == {"gpt2", "llama"}


def test_bandwidth_is_a_rate():
    assert 0.1 < bench.read_bandwidth("cpu", 1 << 20, 2) < 1e4


@pytest.mark.parametrize(
    "wrong",
    [{"tokens": 1}, {"repeats": 0}, {"batch": 0}, {"skipped": (1.0,)}, {"device": "cuda", "weights": ("int8",)}],
)
def test_options_out_of_range(wrong):
    with pytest.raises(InputError):
        BenchOptions("gpt2-small", **wrong)


@pytest.mark.parametrize(
    ("text", "policy", "budget"),
    [
        ("rl", "rl", None),
        ("rl@0.7", "rl", 0.7),
        ("me/mine@v1", "me/mine@v1", None),
        ("me/mine@v1@.5", "me/mine@v1", 0.5),
    ],
)
def test_a_budget_stands_behind_the_last_at(text, policy, budget):
    assert policy_and_budget(text) == (policy, budget)


def test_wrong_names_are_errors(llama_folder, tmp_path, run_anee):
    out = ["--json", tmp_path / "bench.json"]
    assert "unknown dtype 'float31'" in run_anee("bench", "gpt2-small", "--dtype", "float31", *out).err
    assert (
        "'static:skip=1@much' names no budget"
        in run_anee("bench", llama_folder, "--policy", "static:skip=1@much", *out).err
    )
    assert "device 'nowhere' cannot be used" in run_anee("bench", llama_folder, "--device", "nowhere", *out).err


def test_what_is_decided_within_the_library_is_told_apart(tmp_path):
    for part in gate_weights():
        part.save(tmp_path)
    model = adaptive(build("llama"), f"gate:{tmp_path},protect=1 1", 0.7)
    timed = TimedStep(model.engine.step)
    model.use_step(timed)
    model.decode(tokens(1, 9), max_new_tokens=6, eos_token_id=[])
    inside, taken = timed.inside.decisions, timed.close()
    assert 0 < inside < taken["policy"]
    assert 0 < taken["attention"] < taken["layers"]
    model.decode(tokens(1, 9), max_new_tokens=6, eos_token_id=[])
    assert timed.inside.decisions == inside  # nobody looks at a watch any more
