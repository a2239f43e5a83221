"""From a model to a gate with shortcuts that meets its budgets: calibrated, interrupted, and on the command line."""

import logging
from pathlib import Path

import pytest
import torch
from tiny import adaptive, build, tokens

import anee
from anee_core.calibration import GateCalibration, calibrate_gate
from anee_core.calibration import gate as gate_calibration
from anee_core.calibration.options import FitOptions
from anee_core.calibration.shares import spent
from anee_core.conformance.cost import spent_by_token
from anee_core.controllers.gate import GateWeights
from anee_core.errors import BudgetError, CheckpointError, InputError

SMALL = GateCalibration(sequences=24, length=32, fit=FitOptions(rank=8), progress=False)


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    model = adaptive(build("llama"))
    return model, calibrate_gate(model, tmp_path_factory.mktemp("gate"), SMALL)


@pytest.mark.parametrize("budget", [0.65, 0.75, 0.9])
def test_budgets_are_met_on_new_text(calibrated, budget):
    model, folder = calibrated
    gated = anee.load(model.model, f"gate:{folder}+shortcuts:{folder}", budget)
    assert float(spent_by_token(gated, tokens(24, 32, seed=11)).mean()) == pytest.approx(budget, abs=0.05)


def test_what_a_gate_expects_of_scores_are_those_of_first_tokens(calibrated):
    model, folder = calibrated
    weights = GateWeights.load(folder)
    gated = anee.load(model.model, f"gate:{folder}+shortcuts:{folder}", 0.8)
    text = model.generate(tokens(24, 2, seed=5), max_new_tokens=30, do_sample=True)
    cache = gated(text).past_key_values
    scores = cache.scores.entries(cache.seen)[:, 4 : cache.seen].flatten(0, 1)
    free = [2, 3]  # neither protected nor behind nothing but protected ones
    torch.testing.assert_close(scores.mean(0)[free], weights.mean[free], rtol=0, atol=0.3 * float(scores.std()))
    assert (scores.std(0)[free] / weights.spread[free]).log().abs().max() < 0.5


def test_short_texts_spend_little_more_than_their_first_tokens_do():
    model = anee.load("mini", "rl", 0.8, fast=False)
    text = (Path(anee.__file__).parents[1] / "docs" / "concepts.md").read_text()
    paragraphs = [part for part in text.split("\n\n") if len(part) > 300]
    rows = torch.stack([model.tokenizer(part, return_tensors="pt").input_ids[0, :80] for part in paragraphs])
    spent = spent_by_token(model, rows).mean(0)
    # Four run every layer, and the next 32 pay that back.
    assert float(spent[:4].mean()) == pytest.approx(1.0)
    assert float(spent[4:36].mean()) == pytest.approx(0.775, abs=0.03)
    assert float(spent.mean()) == pytest.approx(0.8, abs=0.02)


def test_the_gate_beats_chance(calibrated):
    model, folder = calibrated
    ids = model.generate(tokens(12, 2, seed=5), max_new_tokens=30, do_sample=True)
    with torch.no_grad():
        dense = model(ids).logits.log_softmax(-1)
        apart = {}
        for policy in ("gate:{}+shortcuts:{}", "random:protect=1 2+shortcuts:{}", "random:protect=1 2"):
            sparse = anee.load(model.model, policy.format(folder, folder), 0.75)
            logits = sparse(ids).logits.log_softmax(-1)
            apart[policy.partition(":")[0] + str("shortcuts" in policy)] = float(
                torch.nn.functional.kl_div(logits, dense, log_target=True)
            )
    assert apart["gateTrue"] < apart["randomTrue"] < apart["randomFalse"]


def test_shares_are_kept_by_budget(calibrated):
    model, folder = calibrated
    weights = GateWeights.load(folder)
    assert float(weights.budgets[-1]) == 1
    assert 0.3 < float(weights.budgets[0]) < 0.65
    assert (weights.shares.diff(dim=0) <= 0).all()
    assert not (folder / "work").exists()
    costs = adaptive(model.model, f"gate:{folder}+shortcuts:{folder}", 0.9).engine.costs
    for budget, shares in zip(weights.budgets.tolist(), weights.shares, strict=True):
        assert spent(shares, costs) == pytest.approx(budget, abs=1e-4)


def test_an_interrupted_calibration_goes_on(calibrated, tmp_path, monkeypatch):
    model, folder = calibrated

    class StopSearchError(Exception):
        pass

    def stop(*args):
        raise StopSearchError

    with monkeypatch.context() as patch:
        patch.setattr(gate_calibration, "from_one_score", stop)
        with pytest.raises(StopSearchError):
            calibrate_gate(model, tmp_path, SMALL)
    monkeypatch.setattr(gate_calibration, "own_samples", None)
    calibrate_gate(model, tmp_path, SMALL)
    again, whole = GateWeights.load(tmp_path), GateWeights.load(folder)
    assert torch.equal(again.weight, whole.weight)
    assert torch.equal(again.shares, whole.shares)


def test_wrong_input_is_refused(calibrated, tmp_path):
    model, _ = calibrated
    with pytest.raises(InputError, match="sequences is a whole number, at least 1"):
        GateCalibration(sequences=0)
    with pytest.raises(InputError, match="there is no such file"):
        GateCalibration(text=tmp_path / "none.txt")
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "tokens.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="cannot be read"):
        calibrate_gate(model, tmp_path, SMALL)


def test_command_line(llama_folder, tmp_path, run_anee):
    folder = tmp_path / "gate"
    small = ["--sequences", "8", "--length", "24", "--rank", "4", "--skipped", "0.2"]
    done = run_anee("calibrate", str(llama_folder), "-f", str(folder), *small)
    assert done.code == 0, done.err
    policy = f"gate:{folder}+shortcuts:{folder}"
    assert run_anee("generate", str(llama_folder), "the cat", "-p", policy, "-b", "0.9", "-n", "3").code == 0


@pytest.fixture
def gpt2_folder(tmp_path):
    build("gpt2").save_pretrained(tmp_path / "gpt2-tiny")
    return tmp_path / "gpt2-tiny"


def lines_about_fitting(caplog):
    return [r.getMessage() for r in caplog.records if "fitting" in r.getMessage()]


def test_rl_works_on_a_model_nobody_trained_it_for(gpt2_folder, caplog):
    caplog.set_level(logging.INFO, "anee_core")
    model = anee.load(gpt2_folder, policy="rl", budget=0.8)
    assert len(lines_about_fitting(caplog)) == 1
    torch.manual_seed(3)
    own = anee.load(gpt2_folder).generate(tokens(16, 1, seed=7), max_new_tokens=120, do_sample=True)
    assert float(spent_by_token(model, own).mean()) == pytest.approx(0.8, abs=0.05)
    assert model.last_trace.flops["shortcuts"] > 0
    again = anee.load(gpt2_folder, policy="rl+window:sinks=1,recent=8", budget=0.8)
    assert len(lines_about_fitting(caplog)) == 1
    with torch.no_grad():
        torch.testing.assert_close(again(tokens(1, 8)).logits, model(tokens(1, 8)).logits)
    with pytest.raises(BudgetError, match=r"a budget of 0\.05 cannot be met: the least possible is 0\.\d+"):
        anee.load(gpt2_folder, policy="rl", budget=0.05)


def test_what_was_trained_for_a_model_goes_before_what_is_fitted(calibrated, install, caplog):
    caplog.set_level(logging.INFO, "anee_core")
    _, folder = calibrated
    entries = {f"toy-2/{name}": str(folder) for name in ("gate", "shortcuts")}
    install(
        "toy-gate",
        f"""
        from pathlib import Path
        from anee_core.hookspecs import hookimpl

        @hookimpl
        def anee_trained_policies():
            return {{name: Path(folder) for name, folder in {entries!r}.items()}}
        """,
    )
    network = build("llama").eval()
    network.config.anee_backbone = "toy-2"
    model = anee.load(network, "rl", 0.8)
    assert not lines_about_fitting(caplog)
    with torch.no_grad():
        wanted = anee.load(network, f"rl:folder={folder}", 0.8)(tokens()).logits
        assert torch.equal(model(tokens()).logits, wanted)


def test_shortcuts_alone_are_fitted_on_first_use_too(gpt2_folder):
    model = anee.load(gpt2_folder, policy="static:skip=2+shortcuts")
    model(tokens())
    assert model.last_trace.flops["shortcuts"] > 0
