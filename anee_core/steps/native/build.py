"""Compile the C++ sources for the processor at hand, once, and load the library."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
from functools import lru_cache
from pathlib import Path

import torch
from rich.console import Console

from anee_core.errors import InputError
from anee_core.files import cache_folder, only_one, write_whole
from anee_core.steps.native.structs import LAYOUT

logger = logging.getLogger(__name__)

_SOURCE = Path(__file__).parent / "cpp" / "library.cpp"
"""The source that includes all others in its folder."""
_FLAGS = (
    "-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", "-fopenmp",
    # Sums may be taken in any order; NaN and infinity keep their meaning.
    "-fno-math-errno", "-fno-trapping-math", "-fassociative-math", "-fno-signed-zeros",
)  # fmt: skip


class NoLibraryError(Exception):
    """There is no compiled library, and the message says why."""


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """Return the library; compile it if this was not done before on this machine.

    ``$CXX``, or else g++, compiles it into ANEE's cache folder; so it does again where the file is damaged.

    Raises:
        NoLibraryError: there is no compiler, or it failed, or others may write where the library is kept.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None:
        raise NoLibraryError("there is no g++ (install it, or set CXX)")
    try:
        folder = cache_folder() / "native"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_owner(folder)
        path = folder / f"layer-{_key(compiler)}.so"
        if not _sound(path):
            with only_one(path):
                if not _sound(path):  # another process may have compiled it meanwhile
                    _compile(compiler, path)
        loaded = ctypes.CDLL(str(path))
    except (OSError, InputError) as error:
        raise NoLibraryError(f"it cannot be kept or loaded: {error}") from error
    _check_layout(loaded)
    pointer, count = ctypes.c_void_p, ctypes.c_int32
    loaded.anee_multiplies_bf16.argtypes, loaded.anee_multiplies_bf16.restype = [], count
    loaded.anee_run.argtypes, loaded.anee_run.restype = [pointer, pointer], None
    loaded.anee_project.argtypes, loaded.anee_project.restype = [pointer, pointer], None
    loaded.anee_stack.argtypes, loaded.anee_stack.restype = [pointer, pointer], None
    loaded.anee_linear.argtypes = [pointer, pointer, pointer, count, count, pointer, count]
    loaded.anee_linear.restype = None
    loaded.anee_norm.argtypes = [pointer, pointer, pointer, count, count, count, pointer]
    loaded.anee_norm.restype = None
    return loaded


def _check_layout(loaded: ctypes.CDLL) -> None:
    """Raise `NoLibraryError` unless the library's structs and constants are those of ``structs.py``.

    It would otherwise read and write where it must not.
    """
    found = (ctypes.c_int32 * (len(LAYOUT) + 1))()
    loaded.anee_layout.argtypes, loaded.anee_layout.restype = [ctypes.c_void_p], ctypes.c_int32
    count = loaded.anee_layout(ctypes.addressof(found))
    if count != len(LAYOUT) or tuple(found[:count]) != LAYOUT:
        raise NoLibraryError(f"its structs are other ones: {found[:count]} and not {list(LAYOUT)}")


def _key(compiler: str) -> str:
    """Return a short hash of all that a library depends on: sources, compiler, C library and processor."""
    source = b"".join(path.read_bytes() for path in sorted(_SOURCE.parent.glob("*.[ch]*")))
    version = subprocess.run([*compiler.split(), "--version"], capture_output=True, text=True, check=False).stdout
    made_by = (compiler, version, *platform.libc_ver(), *_FLAGS, _processor())
    return hashlib.sha256(source + " ".join(made_by).encode()).hexdigest()[:16]


def _check_owner(place: Path) -> None:
    """Raise `NoLibraryError` if another user could have put a library there: it would run as this one."""
    if not hasattr(os, "geteuid"):
        return
    found = place.stat()
    if found.st_uid not in (0, os.geteuid()) or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise NoLibraryError(
            f"other users may write {place}, so what is there is not run: chmod go-w it if it is yours, or set "
            "ANEE_CACHE to a folder of your own"
        )


def _sound(path: Path) -> bool:
    """Return whether a library is there as it was compiled: one that was cut off would end the process."""
    try:
        wanted = _digest_of(path).read_text(encoding="utf-8")
        _check_owner(path)
        return hashlib.sha256(path.read_bytes()).hexdigest() == wanted
    except FileNotFoundError:
        return False


def _digest_of(path: Path) -> Path:
    """Return the place of a library's digest."""
    return path.with_suffix(".sha256")


def _compile(compiler: str, path: Path) -> None:
    command = [*compiler.split(), *_FLAGS, str(_SOURCE)]
    if platform.machine() in ("x86_64", "AMD64"):
        command.append("-mprefer-vector-width=512")
    # torch's own OpenMP, where it brings one: two of them in a process would fight for the cores.
    own = Path(torch.__file__).parent / "lib" / "libgomp.so.1"
    if own.exists():
        command.append(str(own))

    def make(draft: Path) -> None:
        done = subprocess.run([*command, "-o", str(draft)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise NoLibraryError(f"{compiler} failed: {done.stderr.strip()[-300:]}")
        draft.chmod(0o700)

    logger.info("compiling the fast layer step into %s", path)
    with Console(stderr=True).status("compiling the fast layer step for this processor, once (a few seconds)"):
        write_whole(path, make)
        write_whole(_digest_of(path), hashlib.sha256(path.read_bytes()).hexdigest())


def _processor() -> str:
    """Return what identifies the kind of processor: code compiled for one may not run on another."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.platform()
    return "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
