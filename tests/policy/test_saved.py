"""A saved policy decides alike, with the calibration and the budget that it had."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from signed import sign
from tiny import PLUGINS, QUICK

import anee
from anee_core.cache_policies import TovaCachePolicy
from anee_core.controllers import RandomController, StaticController
from anee_core.errors import CheckpointError, PolicyError
from anee_core.policy import Policy, load_policy, parse_policy


def parse(text):
    return parse_policy(text, PLUGINS)


SAVED = {
    "static": ("static:skip=1 2", None),
    "static, calibrated": ("static:protect=1 1", 0.7),
    "random": ("random:p=0.4,protect=0 0,seed=3", None),
    "random, by budget": ("random:protect=1 1,seed=3", 0.7),
    "heuristic": ("heuristic:protect=1 1", 0.7),
    "heuristic, exit": ("heuristic:protect=1 1,spread=0.3,exit=0.2", 0.7),
    "window": ("window:sinks=1,recent=4", None),
    "both": ("heuristic:protect=1 1+window:sinks=1,recent=4", 0.7),
}


@pytest.mark.parametrize("controller", [StaticController(skip=[1, 2]), RandomController(p=0.4, protect=[1, 1])])
def test_a_policy_that_was_given_lists_is_saved_and_read_again(controller, tmp_path):
    policy = Policy(controller, TovaCachePolicy(keep=[0.5, 0.2]))
    policy.save(tmp_path)
    again = load_policy(tmp_path, PLUGINS)
    assert (again.controller, again.cache_policy) == (policy.controller, policy.cache_policy)


def test_protected_ends_are_two_counts(tiny_llama):
    with pytest.raises(PolicyError, match="protect takes two counts, first and last layers, like 'protect=2 2'; got 1"):
        anee.load(tiny_llama, RandomController(p=0.4, protect=1))


@pytest.mark.parametrize("family", ["tiny_llama", "tiny_gpt2"])
@pytest.mark.parametrize(("text", "budget"), SAVED.values(), ids=SAVED.keys())
def test_saved_policy_decides_alike(family, text, budget, request, tmp_path, monkeypatch):
    network = request.getfixturevalue(family)
    ids = torch.randint(2, 97, (2, 9), generator=torch.Generator().manual_seed(5))
    model = anee.load(network, text, budget, calibration=QUICK)
    model.policy.save(tmp_path / "deep" / "policy")

    def fail(*_):
        raise AssertionError("a saved policy brings its calibration along")

    monkeypatch.setattr("anee_core.load.calibrate", fail)
    again = anee.load(network, str(tmp_path / "deep" / "policy"), budget)
    assert again.policy.spelled == model.policy.spelled
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    assert torch.equal(again.last_trace.ran, model.last_trace.ran)
    assert torch.equal(again.last_trace.kept, model.last_trace.kept)
    first, second = (m.decode(ids, max_new_tokens=4) for m in (model, again))
    assert torch.equal(first.sequences, second.sequences)
    assert torch.equal(first.trace.ran, second.trace.ran)


def test_saved_policy_holds_what_calibration_found(tiny_llama, tmp_path):
    model = anee.load(tiny_llama, "heuristic:protect=1 1", 0.7, calibration=QUICK)
    model.policy.save(tmp_path)
    again = load_policy(tmp_path, PLUGINS)
    found, expected = again.calibration, model.policy.calibration
    assert torch.equal(found.importance, expected.importance)
    assert torch.equal(found.confidence, expected.confidence)
    assert (found.fingerprint, found.source) == (expected.fingerprint, "own samples")
    again.save(tmp_path / "second")
    for name in ("policy.json", "policy.safetensors"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_saved_policy_can_be_given_as_string_or_path(tiny_llama, tmp_path):
    parse("static:skip=2").save(tmp_path)
    assert anee.load(tiny_llama, str(tmp_path)).policy.controller.skip == (2,)
    assert anee.load(tiny_llama, tmp_path).policy.controller.skip == (2,)


def test_saving_again_replaces_what_was_there(tiny_llama, tmp_path):
    anee.load(tiny_llama, "heuristic:protect=1 1", 0.7, calibration=QUICK).policy.save(tmp_path)
    parse("static:skip=2").save(tmp_path)
    again = load_policy(tmp_path, PLUGINS)
    assert again.controller == StaticController(skip=(2,))
    assert again.calibration is None


def test_calibration_of_other_weights_is_used_with_a_warning(tiny_llama, tmp_path, caplog):
    anee.load(tiny_llama, "heuristic:protect=1 1", 0.7, calibration=QUICK).policy.save(tmp_path)
    anee.load(tiny_llama, str(tmp_path), 0.7)
    assert not caplog.records
    torch.manual_seed(9)
    other = type(tiny_llama)(tiny_llama.config).eval()
    assert anee.load(other, str(tmp_path), 0.7)
    assert "calibration is of other weights" in caplog.text


def test_calibration_of_another_depth_is_refused(tiny_llama, tmp_path):
    anee.load(tiny_llama, "heuristic:protect=1 1", 0.7, calibration=QUICK).policy.save(tmp_path)
    tensors = load_file(tmp_path / "policy.safetensors")
    save_file({**tensors, "importance": torch.ones(5)}, tmp_path / "policy.safetensors")
    sign(tmp_path)
    with pytest.raises(PolicyError, match="of a model with 5 layers, this one has 4; calibrate this model"):
        anee.load(tiny_llama, str(tmp_path), 0.7)


def test_saved_policy_brings_its_budget(tiny_llama, tmp_path):
    anee.load(tiny_llama, "static:protect=1 1", 0.7, hard=True, calibration=QUICK).policy.save(tmp_path)
    again = anee.load(tiny_llama, str(tmp_path))
    assert again.budget == 0.7
    assert again.engine.budget.hard
    assert anee.load(tiny_llama, str(tmp_path), 0.9).budget == 0.9


@pytest.mark.parametrize("folder", ["../other", "/other", "..", "deep/other"])
def test_saved_policy_that_reaches_outside_its_folder_is_refused(folder, tiny_llama, tmp_path):
    anee.load(tiny_llama, "static:skip=1").policy.save(tmp_path)
    sign(tmp_path, layers=f"static:skip=1+shortcuts:{folder}")
    with pytest.raises(CheckpointError, match="reaches outside its folder"):
        load_policy(tmp_path, PLUGINS)
