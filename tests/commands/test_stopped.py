"""Commands that are stopped, or whose output has no place: one line each, and no traceback."""

import errno
import io
import os
import signal
import sys
from pathlib import Path

import pytest

from anee_core import load as loading


@pytest.fixture
def interruptible():
    """Let SIGINT interrupt, as it does not where a shell runs the tests in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def one_line(outcome, code=2):
    """Return the one line that a failed command says."""
    assert outcome.code == code, outcome.err
    assert "Traceback" not in outcome.err
    lines = [line for line in outcome.errors if line.startswith(("error: ", "interrupted"))]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(
    "command",
    [
        ("report", "MODEL", "Hello", "--out", "FOLDER"),
        ("report", "MODEL", "Hello", "--out", "FILE/page.html"),
        ("eval", "MODEL", "-t", "none", "-p", "dense", "--json", "FOLDER"),
        ("conformance", "llama", "--json", "FILE/out.json"),
        ("sweep", "MODEL", "-p", "random", "-t", "a=TEXT", "--out", "FILE/out"),
        ("bench", "MODEL", "--json", "FILE/out.json"),
        ("bench", "MODEL", "--json", "FOLDER/bench.json", "--markdown", "FOLDER"),
        ("bench", "MODEL", "--json", "FOLDER/bench.json", "--plot", "FILE/out.png"),
        ("publish", "MODEL", "-p", "random", "--to", "FILE/policy"),
    ],
    ids=" ".join,
)
def test_output_without_a_place_is_refused_before_a_model_is_loaded(command, run_anee, text, tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    places = {"FOLDER": tmp_path / "folder", "FILE": tmp_path / "file", "TEXT": text, "MODEL": "no-model"}

    def filled(word):
        for name, place in places.items():
            word = word.replace(name, str(place))
        return word

    monkeypatch.setattr(loading, "load", None)
    line = one_line(run_anee(*map(filled, command)))
    assert line.startswith("error: cannot write ")
    assert line.endswith(("Is a directory; choose another place", "Not a directory; choose another place"))


@pytest.mark.parametrize("command", ["calibrate", "train asa", "train supervised", "train rl", "new-adapter"])
def test_folders_without_a_place_are_refused(command, run_anee, llama_folder, text, tmp_path):
    (tmp_path / "file").touch()
    below = tmp_path / "file" / "folder"
    options = {"calibrate": (llama_folder, "-f", below), "new-adapter": ("stablelm", "-o", below)}
    training = (llama_folder, "-t", text, "-f", below, "--steps", 1)
    line = one_line(run_anee(*command.split(), *options.get(command, training)))
    inside = {"new-adapter": "anee-stablelm", "train rl": "supervised"}.get(command, "")
    assert line == f"error: cannot write {below / inside}: Not a directory; choose another place"


def test_a_picture_of_no_kind_is_refused(run_anee, tmp_path):
    line = one_line(run_anee("bench", "no-model", "--json", tmp_path / "a.json", "--plot", tmp_path / "a.doc"))
    assert "a picture's name ends in" in line


def test_a_full_standard_output_is_one_line(run_anee, monkeypatch):
    class Full(io.StringIO):
        def write(self, written):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sys, "stdout", Full())
    assert one_line(run_anee("plugins"), 1) == "error: No space left on device"


def test_what_the_system_refuses_is_one_line_with_the_file(run_anee, llama_folder, monkeypatch):
    def refused(*arguments, **options):
        raise PermissionError(errno.EACCES, "Permission denied", "/place")

    monkeypatch.setattr(loading, "load", refused)
    assert one_line(run_anee("generate", llama_folder, "Hello"), 1) == "error: Permission denied: /place"


@pytest.mark.parametrize(
    ("command", "goes_on"),
    [
        ("calibrate MODEL", True),
        ("train asa MODEL -t TEXT -f FOLDER", True),
        ("sweep MODEL -p random -t a=TEXT -o FOLDER/out", True),
        ("generate MODEL Hello", False),
        ("report MODEL Hello -o FOLDER/page.html", False),
    ],
)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.usefixtures("interruptible")
def test_a_stopped_command_says_how_to_go_on(command, goes_on, number, run_anee, text, tmp_path, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(loading, "load", lambda *arguments, **options: os.kill(os.getpid(), number))
    monkeypatch.setattr("anee_core.bench.sweep.load", loading.load)
    words = command.replace("TEXT", str(text)).replace("FOLDER", str(tmp_path))
    line = one_line(run_anee(*words.split()), 128 + number)
    wanted = "interrupted: what is done is kept, and the same command goes on from there"
    assert line == (wanted if goes_on else "interrupted")
    assert signal.getsignal(signal.SIGTERM) is before


def test_without_a_home_only_what_needs_a_cache_is_refused(run_anee, llama_folder, monkeypatch):
    def homeless(cls):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", classmethod(homeless))
    known = os.environ["ANEE_CACHE"]
    for name in ("ANEE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert run_anee("generate", llama_folder, "Hello", "-n", 2).code == 0
    line = one_line(run_anee("calibrate", llama_folder))
    assert line == "error: there is no home directory to keep a cache in: set ANEE_CACHE to a folder"
    monkeypatch.setenv("ANEE_CACHE", known)
    assert run_anee("generate", llama_folder, "Hello", "-n", 2).code == 0
