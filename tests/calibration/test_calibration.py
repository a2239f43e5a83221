"""Calibration: what it measures, that it is kept, and that an interruption loses nothing."""

import json
import logging

import pytest
import torch
from tiny import PLUGINS, adaptive, build, tokens

import anee
from anee_core.calibration import CalibrationOptions, calibrate
from anee_core.calibration.fingerprint import digest_of, fingerprint
from anee_core.errors import InputError, PolicyError
from anee_core.interfaces import Calibration

QUICK = CalibrationOptions(sequences=2, length=12, progress=False)


def test_importance_is_the_rise_in_kl_when_a_layer_is_skipped(anee_cache):
    model = adaptive(build("llama"))
    found = calibrate(model, QUICK)
    ids = torch.tensor(json.loads(next(anee_cache.glob("*.json")).read_text())["tokens"])
    assert ids.shape == (2, 12)
    with torch.no_grad():
        dense = model(ids).logits.log_softmax(-1)
        for layer in range(6):
            skipped = adaptive(model.model, f"static:skip={layer}")(ids).logits.log_softmax(-1)
            divergence = torch.nn.functional.kl_div(skipped, dense, log_target=True, reduction="none").sum(-1)
            assert found.importance[layer].item() == pytest.approx(divergence[:, 4:].mean().item(), rel=1e-4, abs=1e-6)
    confidence = dense.exp().amax(-1)[:, 4:]
    assert found.confidence[0].item() == pytest.approx(confidence.min().item(), rel=1e-5)
    assert found.confidence[-1].item() == pytest.approx(confidence.max().item(), rel=1e-5)
    assert bool((found.confidence.diff() >= 0).all())


def test_a_layer_that_does_nothing_is_the_least_important():
    model = build("gpt2")
    with torch.no_grad():
        model.transformer.h[3].attn.c_proj.weight.zero_()
        model.transformer.h[3].attn.c_proj.bias.zero_()
        model.transformer.h[3].mlp.c_proj.weight.zero_()
        model.transformer.h[3].mlp.c_proj.bias.zero_()
    importance = calibrate(adaptive(model), QUICK).importance
    assert importance.argmin() == 3
    assert importance[3] < 1e-6


def test_second_time_it_is_read_from_disk(monkeypatch):
    model = adaptive(build("llama"))
    first = calibrate(model, QUICK)
    calls = []
    original = model.adapter.run
    monkeypatch.setattr(type(model.adapter), "run", lambda self, *a: calls.append(1) or original(*a))
    second = calibrate(model, QUICK)
    assert torch.equal(first.importance, second.importance)
    # Only the dense pass, for the confidence.
    assert len(calls) == 6


def test_interrupted_calibration_goes_on_where_it_stopped(anee_cache, monkeypatch):
    model = adaptive(build("llama"))
    expected = calibrate(model, QUICK)
    for file in anee_cache.glob("*.json"):
        file.unlink()

    from anee_core.calibration import importance as module

    measured = module._logits
    count = 0

    def interrupt(*arguments):
        nonlocal count
        count += 1
        if count == 4:
            raise KeyboardInterrupt
        return measured(*arguments)

    monkeypatch.setattr(module, "_logits", interrupt)
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, QUICK)
    kept = json.loads(next(anee_cache.glob("*.json")).read_text())
    assert len(kept["importance"]) == 2
    count = 10
    again = calibrate(model, QUICK)
    # The dense pass and the four layers that were missing; not the two that were there, nor new samples.
    assert count == 10 + 5
    assert torch.equal(again.importance, expected.importance)
    assert not list(anee_cache.glob("*.tmp"))


@pytest.mark.parametrize("content", ["", "{", "[]", '{"schema": 1}', '{"importance": 3}'])
def test_unreadable_file_is_measured_again_with_a_warning(anee_cache, caplog, content):
    model = adaptive(build("llama"))
    expected = calibrate(model, QUICK)
    file = next(anee_cache.glob("*.json"))
    file.write_text(content)
    with caplog.at_level(logging.WARNING):
        again = calibrate(model, QUICK)
    assert torch.equal(again.importance, expected.importance)
    assert "calibrating again" in caplog.text


@pytest.mark.parametrize("importance", ['"much"', "[" * 100_000, "null"])
def test_a_spoilt_value_is_measured_again_with_a_warning(anee_cache, caplog, importance):
    model = adaptive(build("llama"))
    expected = calibrate(model, QUICK)
    file = next(anee_cache.glob("*.json"))
    file.write_text(file.read_text().replace('"importance": [', f'"importance": [{importance}, '))
    assert torch.equal(calibrate(model, QUICK).importance, expected.importance)
    assert "calibrating again" in caplog.text


def test_fingerprint_tells_models_apart():
    a, b = build("llama"), build("llama")
    assert fingerprint(adaptive(a)) == fingerprint(adaptive(b))
    with torch.no_grad():
        b.model.layers[2].mlp.up_proj.weight.add_(0.1)
    assert fingerprint(adaptive(a)) != fingerprint(adaptive(b))


def test_fingerprint_sees_one_number_among_all():
    a, b = build("llama"), build("llama")
    with torch.no_grad():
        b.model.embed_tokens.weight[41, 13] += 1e-6
    assert fingerprint(adaptive(a)) != fingerprint(adaptive(b))


def test_tokens_are_told_apart_by_their_order_and_shape():
    given = torch.tensor([[1, 2], [3, 4]])
    others = torch.tensor([[2, 1], [3, 4]]), torch.tensor([[1, 2, 3, 4]]), torch.tensor([[1, 3], [2, 4]])
    assert len({digest_of(tensor) for tensor in (given, *others)}) == 4
    assert digest_of(torch.tensor([[1, 3], [2, 4]]).T) == digest_of(given)


def test_text_file_is_used_and_told_apart(tmp_path, word_tokenizer):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog " * 4)
    model = adaptive(build("llama"), tokenizer=word_tokenizer)
    options = CalibrationOptions(text=text, sequences=2, length=12, progress=False)
    from_text = calibrate(model, options)
    assert from_text.source.startswith("text ")
    assert not torch.equal(from_text.importance, calibrate(model, QUICK).importance)
    text.write_text("something else altogether, and long enough for that " * 4)
    assert not torch.equal(from_text.importance, calibrate(model, options).importance)


def test_missing_or_short_text_is_a_clear_error(tmp_path, word_tokenizer):
    model = adaptive(build("llama"), tokenizer=word_tokenizer)
    with pytest.raises(InputError, match="cannot read the calibration text"):
        calibrate(model, CalibrationOptions(text=tmp_path / "none.txt", progress=False))
    short = tmp_path / "short.txt"
    short.write_text("short")
    with pytest.raises(InputError, match="too short"):
        calibrate(model, CalibrationOptions(text=short, progress=False))
    with pytest.raises(InputError, match=r"fit the model.s context \(128\); got a length of 1000"):
        calibrate(model, CalibrationOptions(length=1000, progress=False))


def test_load_calibrates_when_the_policy_needs_it():
    model = anee.load(build("llama"), "heuristic:protect=1 1", 0.7, calibration=QUICK, plugins=PLUGINS)
    assert model.policy.calibration.importance.shape == (6,)
    with torch.no_grad():
        model(tokens())
    assert model.last_trace.layers_run < 1


def test_impossible_budget_shows_before_calibration(monkeypatch):
    from anee_core import load

    monkeypatch.setattr(load, "calibrate", lambda *_: pytest.fail("calibrated for nothing"))
    with pytest.raises(PolicyError, match="least possible"):
        anee.load(build("llama"), "heuristic:protect=2 2", 0.3, plugins=PLUGINS)


def test_calibration_of_another_model_is_refused():
    other = Calibration(torch.rand(9), torch.linspace(0, 1, 101), "other", "made up")
    with pytest.raises(PolicyError, match="9 layers"):
        anee.load(build("llama"), "heuristic:protect=1 1", 0.7, calibration=other, plugins=PLUGINS)


def test_calibration_leaves_the_model_as_it_was():
    model = adaptive(build("llama"), "static:skip=2")
    before = model(tokens()).logits
    calibrate(model, QUICK)
    assert torch.equal(model(tokens()).logits, before)
