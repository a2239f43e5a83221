"""The compiled library: compiled once, compiled again where it is damaged, and never taken from another user."""

import os
import shutil

import pytest
import torch
from tiny import adaptive, build, tokens

from anee_core.steps.native.build import NoLibraryError, library

SCRIPT = """#!/bin/sh
if [ "$1" = --version ]; then echo "version {version}"; exit; fi
echo compiled >> {log}
for last; do :; done
cp {library} "$last"
"""


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """A cache folder of the test's own, and a compiler that only copies; ``kept.compiled`` counts how often."""

    class Kept:
        folder, log, script = tmp_path / "cache" / "native", tmp_path / "log", tmp_path / "compiler"

        def version(self, number):
            self.script.write_text(SCRIPT.format(version=number, log=self.log, library=good))
            self.script.chmod(0o700)

        def files(self):
            return sorted(self.folder.glob("*.so"))

        @property
        def compiled(self):
            return self.log.read_text().count("compiled") if self.log.exists() else 0

        def load(self):
            library.cache_clear()
            return library()

    good = tmp_path / "good.so"
    shutil.copy(library()._name, good)
    made = Kept()
    made.version(1)
    monkeypatch.setenv("ANEE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", str(made.script))
    yield made
    library.cache_clear()


def test_it_is_compiled_once_for_each_compiler(kept):
    assert kept.load()
    assert kept.load()
    assert kept.compiled == 1
    kept.version(2)
    assert kept.load()
    assert kept.compiled == len(kept.files()) == 2
    assert kept.folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("size", [0, 4096])
def test_a_damaged_one_is_compiled_again(kept, size):
    kept.load()
    (path,) = kept.files()
    whole = path.read_bytes()
    path.unlink()  # the process has the old one in its memory
    path.write_bytes(whole[:size])
    path.chmod(0o700)
    assert kept.load()
    assert kept.compiled == 2
    assert path.read_bytes() == whole


def given_away(path, monkeypatch):
    """Let a file or folder be another user's."""
    if os.geteuid() == 0:
        os.chown(path, 12345, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)


@pytest.mark.parametrize("planted", ["folder", "file"])
@pytest.mark.parametrize("how", ["owner", "mode"])
def test_one_that_another_user_could_have_put_there_is_not_run(kept, planted, how, monkeypatch):
    kept.load()
    path = kept.folder if planted == "folder" else kept.files()[0]
    if how == "owner":
        given_away(path, monkeypatch)
    else:
        path.chmod(0o777)
    with pytest.raises(
        NoLibraryError, match=rf"other users may write .*{path.name}.*set ANEE_CACHE to a folder of your"
    ):
        kept.load()
    assert kept.compiled == 1
    library.cache_clear()
    network, ids = build("gpt2"), tokens()
    fast, slow = adaptive(network), adaptive(network, fast=False)
    with torch.no_grad():
        assert torch.equal(fast(ids).logits, slow(ids).logits)
    assert "other users may write" in fast.slow_because
