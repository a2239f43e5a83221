"""A file is written whole or not at all, and what cannot be written is told in one line."""

import errno
import os
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tiny import adaptive, build

from anee_core.calibration import GateCalibration, calibrate_gate
from anee_core.calibration import gate as gate_calibration
from anee_core.calibration.options import FitOptions
from anee_core.errors import OutputError
from anee_core.files import allocate, writable, writable_folder, write_folder, write_whole, writing

FULL = OSError(errno.ENOSPC, "No space left on device")
SMALL = GateCalibration(sequences=4, length=16, fit=FitOptions(rank=4), progress=False)


def half(path):
    """Write a piece of a file, and fail as on a full disk."""
    path.write_bytes(b"half")
    raise FULL


def half_by_rust(path):
    """Fail as safetensors does."""
    path.write_bytes(b"half")
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def half_by_torch(path):
    """Fail as torch does, whose own error says nothing."""
    try:
        half(path)
    except OSError:
        raise RuntimeError("unexpected pos 576 vs 534")  # noqa: B904


@pytest.mark.parametrize("content", [half, half_by_rust, half_by_torch])
def test_a_write_that_fails_half_way_leaves_the_earlier_file(tmp_path, content):
    place = tmp_path / "kept.json"
    write_whole(place, "whole")
    with pytest.raises(OutputError, match=r"cannot write .*kept\.json: No space left on device \(.* are free\)"):
        write_whole(place, content)
    assert place.read_text() == "whole"
    assert os.listdir(tmp_path) == ["kept.json"]


def test_a_folder_is_written_whole_too(tmp_path):
    place = tmp_path / "new" / "folder"
    for text in ("first", "second"):
        write_folder(place, lambda draft, text=text: (draft / text).touch())
        assert os.listdir(place) == [text]
    with pytest.raises(OutputError, match=r"cannot write .*folder: No space left on device"):
        write_folder(place, lambda draft: half(draft / "third"))
    assert os.listdir(place) == ["second"]
    assert os.listdir(tmp_path / "new") == ["folder"]


def test_a_fault_of_the_program_stays_what_it_is(tmp_path):
    with pytest.raises(RuntimeError, match="sizes differ"), writing(tmp_path):
        raise RuntimeError("sizes differ")


def test_a_link_stays_a_link_and_a_pipe_is_written_as_it_is(tmp_path):
    link, pipe = tmp_path / "link", tmp_path / "pipe"
    (tmp_path / "folder").mkdir()
    link.symlink_to(tmp_path / "folder" / "file")
    write_whole(link, "text")
    assert link.is_symlink()
    assert (tmp_path / "folder" / "file").read_text() == "text"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_whole(writable(pipe), "text")
    assert os.read(reader, 10) == b"text"
    os.close(reader)
    assert pipe.is_fifo()


def test_a_place_that_cannot_be_written_is_refused_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"cannot write .*: Is a directory; choose another place"):
        writable(tmp_path)
    with pytest.raises(OutputError, match=r"cannot write .*file/below/out: Not a directory; choose another place"):
        writable(tmp_path / "file" / "below" / "out")
    with pytest.raises(OutputError, match=r"cannot write .*file: Not a directory"):
        writable_folder(tmp_path / "file")
    monkeypatch.setenv("ANEE_CACHE", str(tmp_path / "file"))
    with pytest.raises(OutputError, match="Not a directory; set ANEE_CACHE to another folder"):
        writable_folder(tmp_path / "file" / "fit")
    assert writable(tmp_path / "new" / "out").parent.is_dir()
    assert not os.listdir(tmp_path / "new")


def test_space_is_taken_where_the_system_can_and_asked_for_where_it_cannot(tmp_path, monkeypatch):
    place = tmp_path / "states.npy"
    np.lib.format.open_memmap(place, "w+", np.float32, (1 << 18,))
    size = place.stat().st_size
    allocate(place, size)
    assert place.stat().st_blocks * 512 >= size
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    allocate(place, size)
    with pytest.raises(OSError, match="No space left"):
        allocate(place, 1 << 60)


def test_a_fit_on_a_full_disk_says_what_it_needs_and_goes_on_later(tmp_path, monkeypatch):
    model, folder = adaptive(build("gpt2")), tmp_path / "fit"

    def full(*arguments):
        raise FULL

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full, raising=False)
        need = (
            r"cannot write .*work: No space left on device \(0\.0 MB are needed and .* are free\); make room, or choose"
        )
        with pytest.raises(OutputError, match=need):
            calibrate_gate(model, folder, SMALL)
    assert not list((folder / "work").glob("states-*"))
    assert (calibrate_gate(model, folder, SMALL) / "gate.json").is_file()


def test_a_disk_that_is_too_small_is_known_before_samples_are_drawn(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda place: usage(100, 0, 100))
    monkeypatch.setattr(gate_calibration, "own_samples", None)
    with pytest.raises(OutputError, match=r"are needed and 0\.0 MB are free"):
        calibrate_gate(adaptive(build("gpt2")), tmp_path / "fit", SMALL)


def test_samples_of_another_model_are_not_taken(tmp_path, monkeypatch):
    work = tmp_path / "fit" / "work"
    work.mkdir(parents=True)
    save_file({"of another, seed 0": torch.zeros(4, 16, dtype=torch.long)}, work / "tokens.safetensors")
    facts = []
    monkeypatch.setattr(gate_calibration, "fit", lambda model, blocks, *rest: facts.append(blocks) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        calibrate_gate(adaptive(build("gpt2")), tmp_path / "fit", SMALL)
    assert facts[0].any()


def test_a_fit_stopped_while_it_cleans_up_can_be_made_again(tmp_path, monkeypatch):
    model, folder = adaptive(build("gpt2")), tmp_path / "fit"
    calibrate_gate(model, folder, SMALL)
    alone = (folder / "gate.safetensors").read_bytes()

    def stopped(place):
        (Path(place) / "states-0.npy").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", stopped)
        with pytest.raises(KeyboardInterrupt):
            calibrate_gate(model, folder, SMALL)
    calibrate_gate(model, folder, SMALL)
    assert (folder / "gate.safetensors").read_bytes() == alone
