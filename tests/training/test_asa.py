"""Adaptively sparse attention: deployed against trained, weights on disk, and training from start to resume."""

import json
import math
import os
import shutil
import socket
import subprocess
import sys

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from signed import sign
from tiny import FAMILIES, FEW, adaptive, build, ragged, shared, stepwise, tokens
from transformers import LlamaForCausalLM

import anee
from anee_core.cache_policies.asa import AsaWeights
from anee_core.conformance.cost import expect_counted
from anee_core.errors import CheckpointError, InputError, PolicyError
from anee_core.training.asa import Interactions, SparseAttention, mean_survival, next_token_loss
from anee_core.training.asa_run import train_asa
from anee_core.training.options import AsaOptions
from anee_core.training.run_options import RunOptions

CLOSE = {"atol": 5e-5, "rtol": 1e-3}
RANK = 8


@pytest.fixture
def weights(tmp_path):
    """A folder with random weights that drop about half."""
    torch.manual_seed(5)
    beta = torch.full((6,), 2.0)
    AsaWeights(torch.randn(6, RANK, 32), torch.randn(6, RANK, 32), beta).save(tmp_path / "asa")
    return tmp_path / "asa"


def objective(model, folder, **options):
    loaded = AsaWeights.load(folder)
    interactions = Interactions(6, RANK, 32, 0.0)
    for name in ("query", "key", "beta"):
        getattr(interactions, name).data = getattr(loaded, name)
    return SparseAttention(model.adapter, model.parts, interactions, lambda step: 2.0, 0.1, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_parallel_equals_stepwise_equals_what_training_validates(family, weights):
    model, ids = adaptive(shared(family), f"asa:{weights}", prefill_chunk=5), tokens(length=13)
    with torch.no_grad():
        whole = model(ids)
        steps = stepwise(model, ids)
        trained, survivals = objective(model, weights).run(ids, math.inf)
    torch.testing.assert_close(whole.logits, steps, **CLOSE)
    torch.testing.assert_close(trained, steps, **CLOSE)
    kept = torch.stack([survival[:, -1].exp().sum(-1) for survival in survivals])
    assert whole.past_key_values.kept().tolist() == kept.tolist()
    assert kept.mean() < 11


@pytest.mark.parametrize("family", FEW)
def test_with_layers_skipped_in_ragged_batches(family, weights):
    model = adaptive(build(family), f"random:p=0.5,protect=0 0+asa:{weights}")
    for side in ("left", "right"):
        ids, mask = ragged([12, 5, 9], side)
        with torch.no_grad():
            together = model(ids, attention_mask=mask).logits
            for row in range(3):
                alone = stepwise(model, ids[row, mask[row].bool()][None])
                torch.testing.assert_close(together[row, mask[row].bool()], alone[0], **CLOSE)


def test_reported_flops_count_the_interactions(weights):
    model, ids = adaptive(build("llama"), f"asa:{weights}"), tokens(2, 12)
    expect_counted(model, lambda: model(ids), "a sequence", "")
    expect_counted(model, lambda: model.decode(ids, max_new_tokens=5), "a generation", "")
    assert model.last_trace.flops["token_policy"] > 0


@pytest.mark.parametrize("family", FEW)
def test_training_starts_from_the_unchanged_model_and_has_gradients(family):
    torch.manual_seed(0)
    model, ids = adaptive(build(family)), tokens(2, 24)
    for alpha in (1.5, 2.0, 3.0):
        interactions = Interactions(6, RANK, 32, 1 / (alpha - 1))
        start = SparseAttention(model.adapter, model.parts, interactions, lambda step, a=alpha: a, 0.1)
        start.begin(0)
        with torch.no_grad():
            soft, survivals = start.run(ids, alpha)
            torch.testing.assert_close(soft, model(ids).logits, atol=5e-3, rtol=1e-2)
            assert min(mean_survival(s) for s in survivals) > 0.98
    loss, figures = start(ids)
    loss.backward()
    for parameter in interactions.parameters():
        assert parameter.grad.abs().sum() > 0
    assert 0 <= figures["sparsity"] < 0.02


def test_soft_survival_tends_to_the_deployed_step(weights):
    model, ids = adaptive(build("llama")), tokens(2, 15)
    trained = objective(model, weights)
    with torch.no_grad():
        hard, _ = trained.run(ids, math.inf)
        far = [(trained.run(ids, alpha)[0] - hard).abs().max() for alpha in (2.0, 16.0, 1e4)]
    assert far[2] < 1e-3 < far[0]


def test_mean_survival_counts_droppable_pairs_only():
    assert mean_survival(torch.zeros(2, 5, 5)) == 1
    assert mean_survival(torch.full((2, 5, 5), -1e4)) == 0
    some = torch.full((1, 3, 3), -1e4)
    some[0, 1, 0] = 0.0  # of pairs (1, 0), (2, 0), (2, 1) the last query's do not count
    assert mean_survival(some) == 1


class TestWeights:
    def test_of_another_model_are_refused(self, weights, tmp_path):
        loaded = AsaWeights.load(weights)
        AsaWeights(loaded.query[:5], loaded.key[:5], loaded.beta[:5]).save(tmp_path / "five")
        with pytest.raises(PolicyError, match="for 5 layers of width 32, the model has 6"):
            adaptive(build("llama"), f"asa:{tmp_path / 'five'}")
        AsaWeights(loaded.query, loaded.key, loaded.beta, backbone="other").save(tmp_path / "tuned")
        with pytest.raises(PolicyError, match="trained together with their model"):
            adaptive(build("llama"), f"asa:{tmp_path / 'tuned'}")

    @pytest.mark.parametrize("damage", ["header", "tensors", "schema", "shape", "nan", "missing"])
    def test_damaged_are_refused(self, weights, damage):
        header, tensors = weights / "asa.json", weights / "asa.safetensors"
        if damage == "header":
            header.write_text("{")
        elif damage == "tensors":
            tensors.write_bytes(b"nothing")
        elif damage == "schema":
            header.write_text(json.dumps({**json.loads(header.read_text()), "schema": 99}))
        elif damage == "missing":
            tensors.unlink()
        else:
            known = load_file(tensors)
            known["beta"] = known["beta"][:3] if damage == "shape" else known["beta"] * float("nan")
            save_file(known, tensors)
            sign(weights, "asa")
        with pytest.raises(CheckpointError):
            adaptive(build("llama"), f"asa:{weights}")

    def test_policy_string_and_object_round_trip(self, weights, tmp_path):
        model = adaptive(build("llama"), f"asa:{weights},shift=0.5")
        assert model.policy.spelled == f"dense+asa:folder={weights},shift=0.5"
        with torch.no_grad():
            wanted = model(tokens()).logits
            model.policy.save(tmp_path / "saved")
            # A saved policy needs nothing beside itself.
            shutil.rmtree(weights)
            shutil.move(tmp_path / "saved", tmp_path / "moved")
            again = adaptive(build("llama"), str(tmp_path / "moved"), calibration=None)
            assert torch.equal(again(tokens()).logits, wanted)

    def test_what_a_plugin_has_for_a_model_needs_no_folder(self, weights, install):
        hook = "@hookimpl\ndef anee_trained_policies():\n    return {{'toy-1/asa': Path({!r})}}\n"
        imports = "from pathlib import Path\nfrom anee_core.hookspecs import hookimpl\n"
        install("toy-weights", imports + hook.format(str(weights)))
        network = build("llama").eval()
        with pytest.raises(PolicyError, match="no weights are installed for this model"):
            anee.load(network, "asa")
        network.config.anee_backbone = "toy-1"
        with torch.no_grad():
            found = anee.load(network, "asa:shift=0.5")(tokens()).logits
            assert torch.equal(found, anee.load(network, f"asa:{weights},shift=0.5")(tokens()).logits)


def options(**changes):
    return AsaOptions(
        **{"rank": RANK, "length": 32, "batch": 2, "warmup": 2, "valid_blocks": 2, "rate": 1e-2, **changes}
    )


def run_options(folder, steps=6, **changes):
    return RunOptions(folder, steps, **{"validate_every": 3, "save_every": 2, "progress": False, **changes})


@pytest.mark.parametrize("backbone", ["frozen", "lora", "full"])
def test_training_writes_a_policy_that_loads(backbone, llama_folder, text, tmp_path):
    model = anee.load(llama_folder)
    before = {name: p.clone() for name, p in model.model.named_parameters()}
    history = train_asa(model, [text], run_options(tmp_path / "run"), options(backbone=backbone, target=0.7, gamma=1.0))
    assert [figures["step"] for figures in history] == [3, 6]
    trained = llama_folder if backbone == "frozen" else tmp_path / "run" / "model"
    deployed = anee.load(trained, policy=f"asa:{tmp_path / 'run'}")
    with torch.no_grad():
        deployed(tokens(1, 20))
    same = all(torch.equal(p, before[name]) for name, p in deployed.model.named_parameters() if name in before)
    assert same == (backbone == "frozen")
    if backbone != "frozen":
        with pytest.raises(PolicyError, match="trained together"):
            anee.load(llama_folder, policy=f"asa:{tmp_path / 'run'}")
    if backbone == "lora":
        base = LlamaForCausalLM.from_pretrained(llama_folder)
        merged = PeftModel.from_pretrained(base, str(tmp_path / "run" / "adapter")).merge_and_unload()
        for name, parameter in merged.named_parameters():
            torch.testing.assert_close(parameter, deployed.model.get_parameter(name))
    facts = AsaWeights.load(tmp_path / "run").facts
    assert facts["valid"] == history[-1]
    assert list((tmp_path / "run").rglob("events.out.tfevents*"))


def test_one_model_may_be_trained_for_both_uses(llama_folder, text, tmp_path):
    both = options(backbone="full", distil=True, target=0.7, backbone_rate=1e-2)
    history = train_asa(anee.load(llama_folder), [text], run_options(tmp_path / "run", steps=30), both)
    ids = anee.load(llama_folder).tokenizer(text.read_text()[:64], return_tensors="pt")["input_ids"]
    losses = {}
    for name, folder, policy in (
        ("start", llama_folder, "dense"),
        ("dense", tmp_path / "run" / "model", "dense"),
        ("sparse", tmp_path / "run" / "model", f"asa:{tmp_path / 'run'}"),
    ):
        with torch.no_grad():
            losses[name] = float(next_token_loss(anee.load(folder, policy=policy)(ids).logits, ids))
    assert losses["dense"] < losses["start"] - 1
    assert losses["sparse"] < losses["start"] - 1
    assert history[-1]["dense"] < history[0]["dense"]


def test_an_interrupted_run_resumes_bit_for_bit(llama_folder, text, tmp_path):
    chosen = options(backbone="full")
    train_asa(anee.load(llama_folder), [text], run_options(tmp_path / "whole"), chosen)

    class StopTrainingError(Exception):
        pass

    model = anee.load(llama_folder)
    original, calls = SparseAttention.begin, []

    def interrupted(self, step):
        calls.append(step)
        if step == 5:
            raise StopTrainingError
        original(self, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SparseAttention, "begin", interrupted)
        with pytest.raises(StopTrainingError):
            train_asa(model, [text], run_options(tmp_path / "parts"), chosen)
    resumed = train_asa(anee.load(llama_folder), [text], run_options(tmp_path / "parts"), chosen)
    assert calls == [0, 1, 2, 3, 4, 5]
    assert [figures["step"] for figures in resumed] == [3, 6]
    for file in ("asa.safetensors", "model/model.safetensors"):
        whole, parts = (load_file(tmp_path / name / file) for name in ("whole", "parts"))
        assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_a_folder_with_another_run_is_refused(llama_folder, text, tmp_path):
    train_asa(anee.load(llama_folder), [text], run_options(tmp_path / "run", steps=2), options())
    with pytest.raises(CheckpointError, match="seed was 0, is 1"):
        train_asa(anee.load(llama_folder), [text], run_options(tmp_path / "run", seed=1), options())
    with pytest.raises(CheckpointError, match="batch was 2, is 3"):
        train_asa(anee.load(llama_folder), [text], run_options(tmp_path / "run"), options(batch=3))
    with pytest.raises(CheckpointError, match="backbone was frozen, is full"):
        train_asa(anee.load(llama_folder), [text], run_options(tmp_path / "run"), options(backbone="full"))
    (tmp_path / "run" / "checkpoint" / "trained.safetensors").write_bytes(b"cut short")
    with pytest.raises(CheckpointError, match="cannot be continued"):
        train_asa(anee.load(llama_folder), [text], run_options(tmp_path / "run"), options())


def test_a_run_may_start_from_weights(llama_folder, text, tmp_path):
    train_asa(anee.load(llama_folder), [text], run_options(tmp_path / "first", steps=1), options())
    still = options(start=str(tmp_path / "first"), rate=1e-9)
    train_asa(anee.load(llama_folder), [text], run_options(tmp_path / "second", steps=1), still)
    first, second = (load_file(tmp_path / name / "asa.safetensors") for name in ("first", "second"))
    assert all(torch.allclose(first[name], second[name], atol=1e-6) for name in first)
    with pytest.raises(InputError, match="choose their rank"):
        train_asa(
            anee.load(llama_folder),
            [text],
            run_options(tmp_path / "third"),
            options(start=str(tmp_path / "first"), rank=4),
        )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"backbone": "some"}, "frozen, lora, full"),
        ({"gamma": -1.0}, "gamma is a number, at least 0"),
        ({"target": 1.5}, "target is a number, above 0 and below 1"),
        ({"rank": 0}, "at least 1"),
        ({"alpha": "cosine_1"}, "is no schedule"),
        ({"rate": -1.0}, "rate is a number, above 0"),
        ({"warmup": -1}, "warmup is a whole number, at least 0"),
    ],
)
def test_wrong_options_are_refused(wrong, message):
    with pytest.raises(InputError, match=message):
        options(**wrong)


def test_text_and_folder_that_cannot_be_used_are_refused(llama_folder, tiny_gpt2, word_tokenizer, text, tmp_path):
    binary, file = tmp_path / "binary.txt", tmp_path / "file"
    binary.write_bytes(b"\xff\xfe\x00 no text")
    file.touch()
    with pytest.raises(InputError, match=r"cannot read .*binary\.txt"):
        train_asa(anee.load(llama_folder), [binary], run_options(tmp_path / "run"), options())
    short = anee.load(tiny_gpt2, tokenizer=word_tokenizer)
    with pytest.raises(InputError, match="do not fit the model's context of 64"):
        train_asa(short, [text], run_options(tmp_path / "run"), options(length=65))
    with pytest.raises(InputError, match="is a file; choose another name"):
        run_options(file)


def test_too_little_text_is_refused(llama_folder, text, tmp_path):
    few = tmp_path / "few.txt"
    few.write_text("the cat")
    with pytest.raises(InputError, match="less text than one block"):
        train_asa(anee.load(llama_folder), [few], run_options(tmp_path / "run"), options())
    with pytest.raises(InputError, match="no text file"):
        train_asa(anee.load(llama_folder), [tmp_path / "none.txt"], run_options(tmp_path / "run"), options())
    with pytest.raises(InputError, match="fewer than one batch"):
        train_asa(anee.load(llama_folder), [text], run_options(tmp_path / "run"), options(batch=10_000))


SMALL = ["--rank", "4", "--length", "32", "--batch", "2", "--steps", "2", "--valid-blocks", "2", "--save-every", "1"]


def test_command_line_trains_and_generates(llama_folder, text, tmp_path, run_anee):
    folder = str(tmp_path / "run")
    trained = run_anee("train", "asa", str(llama_folder), "-t", str(text), "-f", folder, *SMALL)
    assert trained.code == 0
    assert "dropped" in trained.err
    assert run_anee("generate", str(llama_folder), "the cat", "-p", f"asa:{folder}", "-n", "3").code == 0


def test_two_processes_train_together(llama_folder, text, tmp_path):
    """They find each other by what accelerate's launcher puts into the environment."""
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    together = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    arguments = ["anee", "train", "asa", str(llama_folder), "-t", str(text), "-f", str(tmp_path / "run"), *SMALL]
    script = f"""
import os, sys
import anee, anee_core.training.asa_run
from anee.cli import main
anee.load({str(llama_folder)!r})  # and all that this imports
other = os.fork()
os.environ["RANK"] = os.environ["LOCAL_RANK"] = "0" if other else "1"
sys.argv = {arguments}
try:
    main()
finally:
    if other:
        assert os.waitpid(other, 0)[1] == 0
"""
    environment = {**os.environ, "ACCELERATE_USE_CPU": "1", **together}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["processes"] == 2
    assert AsaWeights.load(tmp_path / "run").facts["steps"] == 2
    anee.load(llama_folder, policy=f"asa:{tmp_path / 'run'}")


def test_mixed_precision_trains(llama_folder, text, tmp_path):
    train_asa(anee.load(llama_folder), [text], run_options(tmp_path / "run", steps=2, precision="bf16"), options())
    assert AsaWeights.load(tmp_path / "run").query.dtype == torch.float32
