"""Checkpoints are read within limits, whoever wrote them: what cannot be right is refused in one line, at once."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from signed import sign
from tiny import PLUGINS, adaptive, build, gate_weights

import anee
from anee_core.cache_policies import AsaWeights
from anee_core.controllers import GateWeights
from anee_core.errors import CheckpointError, PolicyError
from anee_core.policy import ShortcutWeights, load_policy, parse_policy


@pytest.fixture
def gate(tmp_path):
    """A folder with a gate and shortcuts, and one with a policy that holds them."""
    for weights in gate_weights():
        weights.save(tmp_path / "gate")
    return tmp_path / "gate"


def refused(folder, message):
    with pytest.raises(CheckpointError, match=rf"^[^\n]*{message}[^\n]*$") as caught:
        GateWeights.load(folder)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("name", ["gate.json", "gate.safetensors"])
@pytest.mark.parametrize("what", ["pipe", "device", "folder", "nothing"])
def test_what_is_no_file_is_not_waited_for(gate, name, what):
    (gate / name).unlink()
    if what == "pipe":
        os.mkfifo(gate / name)
    elif what == "device":
        (gate / name).symlink_to("/dev/zero")
    elif what == "folder":
        (gate / name).mkdir()
    refused(gate, "is missing" if what == "nothing" else "no regular file")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 900_000, "is corrupt"),
        ('{"a":' * 100_000, "is corrupt"),
        ('{"schema": ' + "1" * 100_000 + "}", "is corrupt"),
        (" " * (1 << 20) + "{}", "1,048,578 bytes, more than the 1,048,576 that it may have"),
        ('{"schema": 1}', "not of schema 2; fit it with this version"),
    ],
    ids=["lists", "dicts", "digits", "large", "old"],
)
def test_headers_of_any_depth_and_length(gate, content, message):
    (gate / "gate.json").write_text(content)
    refused(gate, message)


@pytest.mark.parametrize("size", [0, -1, True, 2.0, "2", None, [2], 10**4000, 1 << 40])
def test_sizes_are_whole_numbers(gate, size):
    sign(gate, "gate", knots=size)
    refused(gate, "sizes of the gate in .* are whole numbers from 1 to 1,073,741,824; got")


def test_more_than_the_sizes_say_is_not_read(gate, monkeypatch):
    with (gate / "gate.safetensors").open("r+b") as file:
        file.truncate(1 << 40)  # sparse
    refused(gate, "has 1,099,511,627,776 bytes, more than")
    sign_off = json.loads((gate / "gate.json").read_text())
    (gate / "gate.json").write_text(json.dumps({**sign_off, "layers": 1 << 29, "width": 1 << 29}))
    refused(gate, r"claims 288,230,[\d,]+ numbers")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int64, torch.bool, torch.complex64])
def test_numbers_of_uncommon_types_are_refused(gate, dtype):
    tensors = load_file(gate / "gate.safetensors")
    save_file({**tensors, "spread": tensors["spread"].to(dtype)}, gate / "gate.safetensors")
    sign(gate, "gate")
    refused(gate, "expected plain numbers")


@pytest.mark.parametrize("number", [1e20, -1e7, 1e300, float("inf"), float("nan")])
def test_numbers_that_would_overflow_are_refused(gate, number):
    tensors = load_file(gate / "gate.safetensors")
    save_file({**tensors, "weight": tensors["weight"].double() * 0 + number}, gate / "gate.safetensors")
    sign(gate, "gate")
    refused(gate, "below 1,000,000 in size")


@pytest.mark.parametrize(
    "changes",
    [
        {"budgets": torch.tensor([1.0]), "shares": torch.zeros(1, 6)},
        {"budgets": torch.tensor([0.5, 0.5 + 1e-12], dtype=torch.float64)},
        {"budgets": torch.tensor([0.5, 3.0])},
        {"spread": torch.full((6,), 1e-60, dtype=torch.float64)},
    ],
    ids=["one", "equal in fp32", "above 1", "nothing in fp32"],
)
def test_a_gate_has_two_budgets_and_some_spread(gate, changes):
    replace(gate_weights()[0], **changes).save(gate)
    refused(gate, "spreads of 0, budgets out of order or shares out of range")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("number", [1e6, -1e6])
def test_the_largest_numbers_give_finite_logits(gate, tmp_path, dtype, number):
    weights, shortcuts = gate_weights()
    replace(weights, weight=torch.full_like(weights.weight, number), spread=torch.full((6,), 1e-30)).save(gate)
    replace(shortcuts, **{n: torch.full_like(t, number) for n, t in shortcuts.tensors.items()}).save(gate)
    AsaWeights(torch.full((6, 4, 32), number), torch.full((6, 4, 32), -number), torch.full((6,), number)).save(gate)
    model = adaptive(build("llama", dtype=dtype), f"gate:{gate},protect=0 0+shortcuts:{gate}+asa:{gate}", 0.6)
    with torch.no_grad():
        assert model(torch.arange(2, 40)[None]).logits.isfinite().all()


def test_every_bit_of_a_checkpoint_counts(gate):
    GateWeights.load(gate)
    for name in ("gate.safetensors", "gate.json"):
        kept = (gate / name).read_bytes()
        (gate / name).write_bytes(kept.replace(b'"layers": 6', b'"layers": 7') if "json" in name else kept[:-1] + b"!")
        refused(gate, "checksum is another than when it was saved|is corrupt")
        (gate / name).write_bytes(kept)
    header = json.loads((gate / "gate.json").read_text())
    (gate / "gate.json").write_text(json.dumps(header, sort_keys=True))  # another layout says the same
    GateWeights.load(gate)


@pytest.mark.parametrize("weights", [GateWeights, ShortcutWeights, AsaWeights])
def test_what_plugins_bring_agrees_with_its_checksums(weights):
    found = list((Path(__file__).parents[2] / "plugins").glob(f"*/*/*/{weights.format.header}"))
    assert found
    for header in found:
        weights.load(header.parent)


def test_a_saved_policy_takes_no_other_weights(gate, tmp_path, tiny_llama):
    parse_policy(f"gate:{gate}", PLUGINS).save(tmp_path / "saved")
    load_policy(tmp_path / "saved", PLUGINS)
    weights = gate_weights()[0]
    replace(weights, bias=weights.bias + 1).save(tmp_path / "saved" / "gate")
    with pytest.raises(CheckpointError, match=r"the gate in .*saved is not the one saved there; save it again"):
        load_policy(tmp_path / "saved", PLUGINS)


@pytest.mark.parametrize("layers", ["x" * 20_000, "static:skip=1\nstatic", "\0", "\ud800", "gate", "rl"])
def test_names_of_any_kind_are_refused(layers, tmp_path):
    parse_policy("static:skip=1", PLUGINS).save(tmp_path)
    sign(tmp_path, layers=layers)
    with pytest.raises(CheckpointError, match=r"^[^\n]{1,700}$"):
        load_policy(tmp_path, PLUGINS)


def test_a_policy_that_names_itself_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parse_policy("static:skip=1", PLUGINS).save("me+")
    sign(tmp_path / "me+", layers="me", tokens="")
    with pytest.raises(CheckpointError, match="unknown policy 'me'"):
        parse_policy("me+", PLUGINS)


@pytest.mark.parametrize("confidence", [[0.5, 0.4], [-0.1, 0.5], [0.5, 1.5], [0.1, 1e5]])
def test_quantiles_are_rising_probabilities(tiny_llama, confidence, tmp_path):
    model = anee.load(tiny_llama, "static:skip=1")
    model.policy.save(tmp_path)
    save_file({"importance": torch.ones(4), "confidence": torch.tensor(confidence)}, tmp_path / "policy.safetensors")
    sign(tmp_path, calibration={"fingerprint": "0123", "source": "own samples"})
    with pytest.raises(CheckpointError, match=r"'confidence' of the policy in .* are no rising probabilities"):
        load_policy(tmp_path, PLUGINS)


def test_installed_names_are_never_folders(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    for name in ("dense", "static:skip=2", "mine"):
        parse_policy("static:skip=1", PLUGINS).save(name)
    assert parse_policy("dense", PLUGINS).spelled == "dense"
    assert "'dense' is the installed policy; the one in the folder of that name is './dense'" in caplog.text
    assert parse_policy("static:skip=2", PLUGINS).controller.skip == (2,)
    for folder in ("./dense", "mine", "dense/", str(tmp_path / "dense"), "./static:skip=2"):
        assert parse_policy(folder, PLUGINS).controller.skip == (1,)
    with pytest.raises(PolicyError, match="10,000 characters, all printable; got 20,001"):
        parse_policy("x" * 20_001, PLUGINS)
