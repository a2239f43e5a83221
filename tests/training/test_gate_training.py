"""Training the gate: what is trained is what is deployed, gradients reach every part, prices keep budgets."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import FEW, adaptive, build, gate_weights, gated, tokens

import anee
from anee_core.calibration.shares import from_trained
from anee_core.controllers.gate import GateController, GateWeights
from anee_core.errors import CheckpointError, InputError, TrainingError
from anee_core.training import gate_run
from anee_core.training.data import read_text
from anee_core.training.gate import GatedModel
from anee_core.training.gate_run import spending, train_gate, write
from anee_core.training.loop import accelerator_of
from anee_core.training.options import GateOptions, GateTraining, ReinforceOptions, RlTraining
from anee_core.training.reinforce import Reinforce
from anee_core.training.rl_run import train_rl, with_samples
from anee_core.training.run_options import RunOptions


@pytest.mark.parametrize("family", FEW)
def test_what_is_trained_is_what_is_deployed(family, tmp_path):
    trained, deployed = gated(build(family), tmp_path, least=0.4, knots=4)
    trained.eval()
    ids = tokens(3, 18)
    with torch.no_grad():
        logits, spent = trained.run(ids, torch.full((3,), 0.7))
        torch.testing.assert_close(logits, deployed(ids).logits, atol=5e-5, rtol=1e-3)
        ran = deployed.last_trace.ran
    run, skip = deployed.engine.costs.token_shares(torch.arange(18))
    torch.testing.assert_close(spent, torch.where(ran, run[:, None], skip[:, None]).sum(0))
    assert 0.1 < ran.float().mean() < 0.95


@torch.no_grad()
def test_ties_go_by_the_spread_as_they_do_when_deployed():
    dense = adaptive(build("llama"), "dense")
    parts, controller = (dense.adapter, dense.parts, dense.engine.costs), GateController(window=8, first=2)
    trained = GatedModel(*parts, *gate_weights(), controller, GateOptions()).eval()
    unit = torch.randn(2, 40, trained.weight.shape[1], generator=torch.Generator().manual_seed(0))
    wanted = trained.score(unit, 1)
    for part in (trained.weight, trained.bias, trained.mean, trained.spread):
        part.mul_(2**-20)
    torch.testing.assert_close(trained.score(unit, 1), wanted)


def test_tokens_are_compared_with_those_of_the_window_alone(tmp_path):
    gate, shortcuts = gate_weights()
    deployed = adaptive(build("llama"), "dense")
    controller = GateController(window=4, first=2, prior=1.5)
    parts = (deployed.adapter, deployed.parts, deployed.engine.costs)
    trained = GatedModel(*parts, gate, shortcuts, controller, GateOptions()).eval()
    unit = torch.randn(2, 40, gate.weight.shape[1], generator=torch.Generator().manual_seed(0))
    weight = trained.weight[1].detach().double().requires_grad_()
    deviation = unit.double() @ weight + trained.bias[1].detach().double() - trained.mean[1].double()
    spread = float(trained.spread[1])
    distances = []
    for t in range(2, 40):
        window = deviation[:, max(2, t - 4) : t]
        count = window.shape[1] + 1.5
        mean = window.sum(1) / count
        variance = (window.square().sum(1) + 1.5 * spread**2) / count - mean.square()
        distances.append((deviation[:, t] - mean) / variance.sqrt())
    torch.stack(distances, dim=1).sin().sum().backward()
    score = trained.score(unit, 1)[:, 2:]
    values = torch.stack(distances, dim=1).detach().float()
    (score + (values - score).detach()).sin().sum().backward()
    torch.testing.assert_close(trained.weight.grad[1], weight.grad.float(), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("spoilt", ["loss", "weights"])
def test_what_is_not_finite_stops_the_run_and_is_not_saved(llama_folder, text, tmp_path, monkeypatch, spoilt):
    folder = tmp_path / "run"
    train_gate(anee.load(llama_folder), [text], run_options(folder, steps=2), small())
    good = load_file(folder / "checkpoint" / "trained.safetensors")
    forward = GatedModel.forward

    def spoil(self, input_ids):
        loss, figures = forward(self, input_ids)
        if spoilt == "weights":
            with torch.no_grad():
                self.mean.fill_(torch.nan)
        return (loss * torch.nan if spoilt == "loss" else loss), figures

    monkeypatch.setattr(GatedModel, "forward", spoil)
    with pytest.raises(TrainingError, match="go on from it with a lower learning rate"):
        train_gate(anee.load(llama_folder), [text], run_options(folder, save_every=1), small())
    kept = load_file(folder / "checkpoint" / "trained.safetensors")
    assert all(torch.equal(kept[name], good[name]) for name in good)
    monkeypatch.undo()
    train_gate(anee.load(llama_folder), [text], run_options(folder), small(rate=0.5))
    monkeypatch.setattr(GatedModel, "forward", spoil)
    with pytest.raises(TrainingError, match="start again with a lower"):
        train_gate(anee.load(llama_folder), [text], run_options(tmp_path / "new", save_every=1), small())


def test_the_scale_of_half_precision_is_kept_with_a_run(llama_folder, text, tmp_path, monkeypatch):
    made = []

    def with_scaler(options):
        accelerator = accelerator_of(options)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0 ** (3 + len(made)))
        made.append(accelerator.scaler)
        return accelerator

    monkeypatch.setattr(gate_run, "accelerator_of", with_scaler)
    train_gate(anee.load(llama_folder), [text], run_options(tmp_path / "run", steps=1), small())
    train_gate(anee.load(llama_folder), [text], run_options(tmp_path / "run", steps=2), small())
    assert [scaler.get_scale() for scaler in made] == [8.0, 8.0]


def test_a_checkpoint_is_there_at_any_time(llama_folder, text, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    train_gate(anee.load(llama_folder), [text], run_options(folder, steps=1), small())
    (folder / "checkpoint").rename(folder / "old")  # where it lies between two renames
    rename = Path.rename

    def dying(self, target):
        if self.name == "draft":
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", dying)
    with pytest.raises(KeyboardInterrupt):
        train_gate(anee.load(llama_folder), [text], run_options(folder, steps=2), small())
    monkeypatch.undo()
    assert json.loads((folder / "old" / "step.json").read_text())["step"] == 1


def test_every_part_gets_a_gradient_and_the_model_none(tmp_path):
    network = build("llama")
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    trained, _ = gated(network, tmp_path)
    trained.train()
    torch.manual_seed(0)
    loss, figures = trained(tokens(3, 20))
    loss.backward()
    for name in ("down", "up", "shortcut_bias", "weight", "bias", "thresholds"):
        assert getattr(trained, name).grad[1:-1].abs().sum() > 0, name
    assert 0 < figures["spent"] < 1


def test_the_price_rises_while_a_budget_is_exceeded(tmp_path):
    trained, _ = gated(build("llama"), tmp_path, least=0.4, knots=3)
    trained.train()
    with torch.no_grad():
        trained.thresholds.fill_(-9.0)  # everything runs
        before = trained.price.clone()
        for _ in range(8):
            trained(tokens(4, 16))
        assert (trained.price[:2] > before[:2]).all()
        trained.thresholds.fill_(9.0)  # everything skips
        before = trained.price.clone()
        for _ in range(8):
            trained(tokens(4, 16))
        assert (trained.price[1:] < before[1:]).all()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"least": 0.0}, "least is a number, above 0 and below 0.95"),
        ({"knots": 1}, "knots is a whole number, at least 2"),
        ({"temperature": 0.0}, "above 0"),
    ],
)
def test_wrong_options_are_refused(wrong, message):
    with pytest.raises(InputError, match=message):
        GateOptions(**wrong)


def small(**changes):
    options = {"gate": GateOptions(least=0.9, knots=3), "rank": 4, "length": 24, "batch": 2, "warmup": 2}
    return GateTraining(**{**options, "valid_blocks": 4, "calibration_sequences": 8, **changes})


def run_options(folder, **changes):
    return RunOptions(folder, **{"steps": 4, "validate_every": 2, "save_every": 2, "progress": False, **changes})


def test_a_run_resumes_and_loads(llama_folder, text, tmp_path):
    whole = train_gate(anee.load(llama_folder), [text], run_options(tmp_path / "whole"), small())
    assert [figures["step"] for figures in whole] == [2, 4]
    begin, steps = GatedModel.begin, []

    class StopTrainingError(Exception):
        pass

    def interrupted(self, step):
        steps.append(step)
        if len(steps) == 4:
            raise StopTrainingError
        begin(self, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GatedModel, "begin", interrupted)
        with pytest.raises(StopTrainingError):
            train_gate(anee.load(llama_folder), [text], run_options(tmp_path / "parts"), small())
    train_gate(anee.load(llama_folder), [text], run_options(tmp_path / "parts"), small())
    for file in ("gate.safetensors", "shortcuts.safetensors"):
        first, second = (load_file(tmp_path / name / file) for name in ("whole", "parts"))
        assert all(torch.equal(first[name], second[name]) for name in first)
    folder = tmp_path / "whole"
    model = anee.load(llama_folder, policy=f"gate:{folder}+shortcuts:{folder}", budget=0.95)
    model(tokens(1, 20))
    assert model.last_trace.flops["shortcuts"] > 0
    with pytest.raises(CheckpointError, match="batch was 2, is 3"):
        train_gate(anee.load(llama_folder), [text], run_options(tmp_path / "parts"), small(batch=3))


def test_mixed_precision_trains_nearly_the_same(llama_folder, text, tmp_path):
    found = {}
    for precision in ("no", "bf16"):
        run = run_options(tmp_path / precision, precision=precision)
        train_gate(anee.load(llama_folder), [text], run, small(rate=1e-9))
        found[precision] = load_file(tmp_path / precision / "shortcuts.safetensors")
    for name, tensor in found["no"].items():
        torch.testing.assert_close(found["bf16"][name], tensor)


def test_a_run_goes_on_from_another(llama_folder, text, tmp_path):
    train_gate(anee.load(llama_folder), [text], run_options(tmp_path / "first"), small())
    first = str(tmp_path / "first")
    train_gate(anee.load(llama_folder), [text], run_options(tmp_path / "second"), small(start=first, rate=1e-9))
    assert not (tmp_path / "second" / "start").exists()
    before, after = (GateWeights.load(tmp_path / name) for name in ("first", "second"))
    torch.testing.assert_close(after.weight, before.weight / before.spread[:, None])
    with pytest.raises(InputError, match="choose their rank"):
        train_gate(anee.load(llama_folder), [text], run_options(tmp_path / "third"), small(start=first, rank=5))


def test_budgets_are_met_on_held_out_text(tmp_path):
    objective, _ = gated(build("llama"), tmp_path, least=0.6, knots=4)
    objective.held_out = tokens(8, 64)
    options = small(protect=(1, 1))
    static = from_trained(objective.fitted()[0], objective.costs, frozenset({0, 5}))
    static.save(tmp_path)
    missed = spending(objective, tmp_path, options) - objective.budgets.numpy()
    write(objective, options, run_options(tmp_path), {})
    left = spending(objective, tmp_path, options) - objective.budgets.numpy()
    assert abs(missed).max() > 0.01
    assert abs(left).max() < 0.004


def test_command_line(llama_folder, text, tmp_path, run_anee):
    small = ["--steps", "2", "--length", "24", "--batch", "2", "--rank", "4", "--calibration-sequences", "8"]
    where = ["-t", str(text), "-f", str(tmp_path / "run"), "--valid-blocks", "2", "--least", "0.9"]
    done = run_anee("train", "supervised", str(llama_folder), *where, *small)
    assert done.code == 0, done.err
    assert (tmp_path / "run" / "gate.json").exists()


def test_rl_keeps_the_better_stage_and_reports_both(llama_folder, text, tmp_path, run_anee):
    small = ["--steps", "2", "--reinforce-steps", "2", "--rollouts", "2", "--length", "24", "--batch", "2"]
    where = ["-t", str(text), "-f", str(tmp_path / "run"), "--valid-blocks", "2", "--least", "0.9"]
    done = run_anee("train", "rl", str(llama_folder), *where, *small, "--rank", "4", "--calibration-sequences", "8")
    assert done.code == 0, done.err
    assert "KL to dense, supervised" in done.err
    assert "KL to dense, reinforce" in done.err
    assert load_file(tmp_path / "run" / "reinforce" / "samples.safetensors")["tokens"].shape == (32, 24)
    stages = [load_file(tmp_path / "run" / name / "gate.safetensors") for name in ("supervised", "reinforce")]
    kept = load_file(tmp_path / "run" / "gate.safetensors")
    same = [all(torch.equal(kept[n], stage[n]) for n in kept) for stage in stages]
    assert sum(same) == 1
    stages = json.loads((tmp_path / "run" / "stages.json").read_text())
    means = {name: sum(by_budget.values()) for name, by_budget in stages["divergence"].items()}
    assert means[stages["kept"]] == min(means.values())
    assert stages["kept"] == ("supervised", "reinforce")[same.index(True)]
    policy = f"rl:folder={tmp_path / 'run'}"
    assert run_anee("generate", str(llama_folder), "the cat", "-p", policy, "-b", "0.95", "-n", "3").code == 0


def test_the_second_stage_reads_what_the_model_writes_too(llama_folder, text, tmp_path):
    model, options = anee.load(llama_folder), RlTraining(small(gate=GateOptions(least=0.8)), samples=6)
    train_gate(model, [text], run_options(tmp_path / "first", steps=0), options.supervised)
    blocks, _ = read_text(model, [text], None, tmp_path / "tokens", 24, 4)
    run = run_options(tmp_path / "second")
    for _ in range(2):  # drawn once, and kept for a run that goes on
        more = with_samples(model, blocks, tmp_path / "first", 0.9, run, options)
        written = load_file(tmp_path / "second" / "samples.safetensors")["tokens"]
        assert written.shape == (6, 24)
        assert torch.equal(more[len(blocks) :]["input_ids"], written)
    assert len({tuple(row) for row in written.tolist()}) == 6
    assert str(model.policy) == "dense"
    with pytest.raises(InputError, match="samples is a whole number, at least 0"):
        RlTraining(samples=-1)


def test_reinforce_goes_on_as_if_it_had_not_stopped(llama_folder, text, tmp_path, monkeypatch):
    def train(name):
        chosen = RlTraining(small(), ReinforceOptions(rollouts=2), steps=4)
        run = run_options(tmp_path / name, steps=2, save_every=1, validate_every=0)
        train_rl(anee.load(llama_folder), [text], run, chosen)

    train("whole")
    forward, calls = Reinforce.forward, []

    def failing(self, input_ids):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return forward(self, input_ids)

    monkeypatch.setattr(Reinforce, "forward", failing)
    with pytest.raises(KeyboardInterrupt):
        train("parts")
    train("parts")
    assert len(calls) == 5
    for file in ("gate.safetensors", "shortcuts.safetensors"):
        found, wanted = (load_file(tmp_path / name / "reinforce" / file) for name in ("parts", "whole"))
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
