"""What a trace says, as numbers, text, JSON and picture."""

import json
import sys

import pytest
import torch
from tiny import adaptive, build, ragged, tokens

from anee_core.errors import MissingPackageError


def test_trace_of_a_forward():
    model = adaptive(build("llama"), "static:skip=1 4")
    ids, mask = ragged([3, 7], "left")
    output = model(ids, attention_mask=mask)
    trace = model.last_trace
    assert trace.ran.shape == (6, 2, 7)
    assert trace.ran[:, 0].any(0).tolist() == [False] * 4 + [True] * 3
    assert trace.layers_run == pytest.approx(4 / 6)
    assert trace.kept.tolist() == [[3, 7]] * 6
    assert trace.kv_bytes == output.past_key_values.nbytes() == 6 * 2 * (2 * 2 * 7 * 8) * 4


def test_trace_of_a_generation_covers_prompt_and_new_tokens():
    model = adaptive(build("llama"), "static:skip=1 4")
    model.generate(tokens(2, 5), max_new_tokens=4, do_sample=False)
    # The last new token is not fed in again.
    assert model.last_trace.ran.shape == (6, 2, 8)
    assert [step.phase for step in model.last_trace.steps] == ["prefill", "decode", "decode", "decode"]
    phases = [model.last_trace.spent(phase).layer_flops for phase in ("prefill", "decode")]
    assert sum(phases) == model.last_trace.flops["layers"]


def test_prompt_read_densely_is_not_held_against_the_budget():
    model = adaptive(build("llama"), "heuristic:protect=1 1", 0.7, prefill="dense")
    model.generate(tokens(1, 30), max_new_tokens=40, do_sample=False)
    trace = model.last_trace
    assert trace.budget_spent == pytest.approx(0.7, abs=0.02)
    assert trace.spent().share > trace.budget_spent
    assert "30 of them a prompt read densely" in str(trace)


def test_trace_becomes_json_and_a_table():
    model = adaptive(build("gpt2"), "random:p=0.5,protect=0 0")
    model(tokens(2, 5))
    trace = model.last_trace
    data = json.loads(json.dumps(trace.to_dict()))
    assert torch.equal(torch.tensor(data["ran"]).bool(), trace.ran)
    assert data["flops"]["spent"] < data["flops"]["dense"]
    for line in ("layers run per token", "K/V of skipped layers", "FLOPs saved", "K/V cache"):
        assert line in str(trace)


def test_picture_has_a_line_per_token_and_a_mark_per_layer():
    model = adaptive(build("gpt2"), "static:skip=1 4")
    ids, mask = ragged([2, 4], "left")
    model(ids, attention_mask=mask)
    lines = model.last_trace.draw(row=0, tokens=["", "", "Hi", "there\n"]).splitlines()
    assert lines[0].split()[0] == "layer"
    assert [line.split() for line in lines[1:]] == [["Hi", "█·██·█", "4"], ["there\\n", "█·██·█", "4"]]


def test_picture_as_an_image(tmp_path):
    pytest.importorskip("matplotlib")
    model = adaptive(build("gpt2"), "static:skip=1 4")
    model(tokens(1, 5))
    path = tmp_path / "picture.png"
    model.last_trace.plot(str(path))
    assert path.read_bytes().startswith(b"\x89PNG")


def test_picture_without_matplotlib_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    model = adaptive(build("gpt2"))
    model(tokens(1, 5))
    with pytest.raises(MissingPackageError, match=r"anee\[plot\]"):
        model.last_trace.plot("unused.png")
