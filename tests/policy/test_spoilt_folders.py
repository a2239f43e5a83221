"""Policy folders that cannot be read or written, each refused in one readable line."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from signed import sign
from tiny import PLUGINS, QUICK

import anee
from anee_core.errors import CheckpointError, OutputError
from anee_core.policy import Policy, SignalProfiler, load_policy, parse_policy


def parse(text):
    return parse_policy(text, PLUGINS)


def write(path, **changes):
    """Save a calibrated policy, with changes to its header."""
    tensors = {"importance": torch.rand(4), "confidence": torch.linspace(0, 1, 101)}
    header = {
        "schema": 2,
        "layers": "heuristic",
        "tokens": "full",
        "budget": 0.7,
        "hard": False,
        "trained": {},
        "calibration": {"fingerprint": "0123", "source": "own samples"},
    }
    header = {k: v for k, v in {**header, **changes}.items() if v is not ...}
    (path / "policy.json").write_text(json.dumps(header))
    save_file(tensors, path / "policy.safetensors")
    sign(path)


def refusal(path):
    """Return the message of the one readable error that loading gives, as a folder and as a policy string."""
    with pytest.raises(CheckpointError) as caught:
        load_policy(path, PLUGINS)
    text = str(caught.value)
    assert "\n" not in text
    assert str(path) in text
    with pytest.raises(CheckpointError, match=r"^[^\n]+$"):
        parse(str(path))
    return text


def test_the_folder_that_these_tests_spoil_loads(tmp_path):
    write(tmp_path)
    assert load_policy(tmp_path, PLUGINS).calibration.confidence.shape == (101,)


@pytest.mark.parametrize("name", ["policy.json", "policy.safetensors"])
def test_missing_file_is_named(tmp_path, name):
    write(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing; a policy folder has policy.json and policy.safet"):
        load_policy(tmp_path, PLUGINS)
    assert "policy.json" in refusal(tmp_path)


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere/policy\.json is missing"):
        load_policy(tmp_path / "nowhere", PLUGINS)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b'{"schema": 2,\n "layers": "stat', b"\xff\xfe\x00", b"not json"],
    ids=["empty", "brace", "half", "bytes", "words"],
)
def test_garbage_header_is_corrupt(tmp_path, content):
    write(tmp_path)
    (tmp_path / "policy.json").write_bytes(content)
    assert "is corrupt" in refusal(tmp_path)


@pytest.mark.parametrize("size", [0, 4, 60, -8])
def test_truncated_tensors_are_corrupt(tmp_path, size):
    write(tmp_path)
    file = tmp_path / "policy.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    assert "is corrupt" in refusal(tmp_path)


@pytest.mark.parametrize("content", [[], "text", None, {}, {"schema": 1}, {"schema": 3}, {"schema": "2"}])
def test_other_schema_is_refused(tmp_path, content):
    write(tmp_path)
    (tmp_path / "policy.json").write_text(json.dumps(content))
    assert "is not of schema 2; save the policy with this version" in refusal(tmp_path)


@pytest.mark.parametrize("key", ["layers", "tokens", "calibration"])
def test_missing_key_is_refused(tmp_path, key):
    write(tmp_path, **{key: ...})
    text = refusal(tmp_path)
    assert "expected" in text
    assert f"'{key}'" in text or key == "calibration"


def test_extra_key_is_refused(tmp_path):
    write(tmp_path, extra=1)
    assert "'extra'" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["importance", "confidence"])
def test_missing_tensor_is_refused(tmp_path, name):
    write(tmp_path)
    tensors = load_file(tmp_path / "policy.safetensors")
    del tensors[name]
    save_file(tensors, tmp_path / "policy.safetensors")
    sign(tmp_path)
    assert "expected" in refusal(tmp_path)


def test_extra_tensor_is_refused(tmp_path):
    write(tmp_path)
    save_file({**load_file(tmp_path / "policy.safetensors"), "surplus": torch.ones(2)}, tmp_path / "policy.safetensors")
    sign(tmp_path)
    assert "'surplus'" in refusal(tmp_path)


@pytest.mark.parametrize(
    "tensor",
    [torch.ones(2, 2), torch.ones(4, dtype=torch.int64), torch.tensor([1.0, float("nan")]), torch.tensor(1.0)],
    ids=["matrix", "integers", "nan", "scalar"],
)
@pytest.mark.parametrize("name", ["importance", "confidence"])
def test_tensor_of_the_wrong_kind_is_refused(tmp_path, name, tensor):
    write(tmp_path)
    save_file({**load_file(tmp_path / "policy.safetensors"), name: tensor}, tmp_path / "policy.safetensors")
    sign(tmp_path)
    assert f"'{name}'" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": "gone:depth=3"}, "unknown policy 'gone'"),
        ({"layers": "random:p=7"}, "p is a number, at least 0 and at most 1"),
        ({"layers": 5}, "does not say what it is made of"),
        ({"tokens": "static"}, "two layer policies"),
        ({"calibration": 3}, "does not say what its calibration is of"),
        ({"calibration": {"fingerprint": "0123"}}, "does not say what its calibration is of"),
    ],
)
def test_header_that_names_no_policy_is_refused(tmp_path, changes, message):
    write(tmp_path, **changes)
    assert message in refusal(tmp_path)


def test_policy_that_cannot_be_written_is_a_readable_error(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "taken" / "policy.safetensors").mkdir(parents=True)
    for folder in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / "taken"):
        with pytest.raises(OutputError, match=r"^cannot write [^\n]+; choose another place$"):
            parse("static:skip=1").save(folder)


def test_policy_with_a_profiler_of_its_own_is_not_saved_without_it(tmp_path):
    class OwnProfiler(SignalProfiler):
        """Another profiler."""

    with pytest.raises(CheckpointError, match="OwnProfiler"):
        Policy(profiler=OwnProfiler()).save(tmp_path)
    assert not list(tmp_path.iterdir())


def test_wrong_budget_is_refused(tiny_llama, tmp_path):
    write(tmp_path, budget=7)
    with pytest.raises(CheckpointError, match=r"lies in \(0, 1\]"):
        anee.load(tiny_llama, str(tmp_path))
    write(tmp_path, hard="maybe")
    assert "neither true nor false" in refusal(tmp_path)


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return Path.write_text, (self.target, "boom")


def test_no_pickle_is_written_or_read(tmp_path, tiny_llama, monkeypatch):
    with monkeypatch.context() as patch:

        def fail(*_, **__):
            raise AssertionError("pickle is never touched")

        for name in ("load", "loads", "dump", "dumps", "Pickler", "Unpickler"):
            patch.setattr(pickle, name, fail)
        for name in ("load", "save"):
            patch.setattr(torch, name, fail)
        model = anee.load(tiny_llama, "heuristic:protect=1 1", 0.7, calibration=QUICK)
        model.policy.save(tmp_path)
        load_policy(tmp_path, PLUGINS)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["policy.json", "policy.safetensors"]

    target = tmp_path / "boom"
    (tmp_path / "policy.safetensors").write_bytes(pickle.dumps(Bomb(target)))
    assert "is corrupt" in refusal(tmp_path)
    torch.save({"importance": Bomb(target)}, tmp_path / "policy.safetensors")
    assert "is corrupt" in refusal(tmp_path)
    assert not target.exists()
